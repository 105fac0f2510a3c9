# A ViT of timm in mmpretrain's TimmClassifier; data and settings of vit_classifier.
_base_ = './vit_classifier.py'
model = dict(
    _delete_=True,
    type='TimmClassifier',
    model_name='vit_tiny_patch16_224',
    img_size=32,
    patch_size=8,
    embed_dim=32,
    depth=2,
    num_heads=2,
    num_classes=2,
    data_preprocessor=dict(
        type='ClsDataPreprocessor', num_classes=2, mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True
    ),
)
