# Mask R-CNN, plain ViT-B (ViTDet), COCO. Float: 51.6 box / 45.7 mask AP. `load_from` is the file
# `python tools/model_converters/vitdet_to_gplq.py` writes for mmdet's public checkpoint.
_base_ = [
    './_base_/mask_rcnn_vit-b_coco.py',
    './_base_/stage1_detection.py',
]
load_from = 'checkpoints/vitdet_mask-rcnn_vit-b-mae_lsj-100e.pth'
model = dict(
    type='gplq_mm.GPLQ', float_type='MaskRCNN', recipe=dict(base='w4a4'),
    backbone=dict(init_cfg=None))
train_cfg = _base_.stage1_loop
default_hooks = dict(checkpoint=_base_.stage1_checkpoint)
optim_wrapper = dict(_delete_=True, constructor='gplq_mm.GPLQOptimWrapperConstructor')
param_scheduler = _base_.stage1_scheduler
