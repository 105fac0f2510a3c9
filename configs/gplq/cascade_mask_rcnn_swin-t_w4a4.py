# Cascade Mask R-CNN, Swin-T, COCO. Float: 50.4 box / 43.7 mask AP. `load_from` is the file
# `python tools/model_converters/swin_to_gplq.py` writes for Swin's own public checkpoint.
_base_ = [
    './_base_/cascade_mask_rcnn_swin-t_coco.py',
    './_base_/stage1_detection.py',
]
load_from = 'checkpoints/cascade_mask_rcnn_swin_tiny_patch4_window7.pth'
model = dict(
    type='gplq_mm.GPLQ', float_type='CascadeRCNN', recipe=dict(base='w4a4'),
    backbone=dict(init_cfg=None))
train_cfg = _base_.stage1_loop
default_hooks = dict(checkpoint=_base_.stage1_checkpoint)
optim_wrapper = dict(_delete_=True, constructor='gplq_mm.GPLQOptimWrapperConstructor')
param_scheduler = _base_.stage1_scheduler
