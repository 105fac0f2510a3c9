# A Swin of four blocks, 16 and 32 dims, shifted windows, for the images of vit_classifier.
_base_ = './vit_classifier.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        arch=dict(embed_dims=16, depths=[2, 2], num_heads=[2, 4]),
        img_size=32,
        patch_size=2,
        window_size=4,
        drop_path_rate=0.0,
        out_indices=(1,),
        pad_small_map=True,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead'),
)
