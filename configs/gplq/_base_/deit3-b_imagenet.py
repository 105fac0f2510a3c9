# DeiT III-B, ImageNet-1k, float: a ViT with LayerScale. mmpretrain 1.2.0 has a class of that
# name, but its blocks use ln1 instead of ln2, so the published weights do not fit.
_base_ = 'mmpretrain::deit3/deit3-base-p16_64xb64_in1k.py'
model = dict(backbone=dict(
    type='VisionTransformer', arch='deit-base', layer_scale_init_value=1e-4))
