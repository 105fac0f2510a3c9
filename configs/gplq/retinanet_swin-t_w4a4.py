# RetinaNet, Swin-T, COCO. No zoo has this model: train mmdet's own config (the first base), or give
# yours by --cfg-options load_from=...
_base_ = [
    'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py',
    './_base_/stage1_detection.py',
]
load_from = 'checkpoints/retinanet_swin-t-p4-w7_fpn_1x_coco.pth'
model = dict(
    type='gplq_mm.GPLQ', float_type='RetinaNet', recipe=dict(base='w4a4'),
    backbone=dict(init_cfg=None))
train_cfg = _base_.stage1_loop
default_hooks = dict(checkpoint=_base_.stage1_checkpoint)
optim_wrapper = dict(_delete_=True, constructor='gplq_mm.GPLQOptimWrapperConstructor')
param_scheduler = _base_.stage1_scheduler
