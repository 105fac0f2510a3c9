# The same Mask R-CNN on a plain ViT of two blocks (one windowed, one global) and a simple pyramid.
_base_ = './mask_rcnn_swin.py'
arch = dict(
    embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64, global_attn_indexes=[1]
)
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.ViTSAM',
        arch=arch,
        img_size=64,
        patch_size=8,
        window_size=4,
        out_channels=0,
    ),
    neck=dict(
        _delete_=True,
        type='gplq_mm.SimpleFeaturePyramid',
        backbone_channel=32,
        in_channels=[8, 16],
        out_channels=16,
        num_outs=2,
    ),
    rpn_head=dict(anchor_generator=dict(scales=[8], strides=[2, 4])),
    roi_head=dict(
        bbox_roi_extractor=dict(featmap_strides=[2, 4]),
        mask_roi_extractor=dict(featmap_strides=[2, 4]),
    ),
)
