# Mask R-CNN, Swin-T, COCO. Float (OpenMMLab zoo, 1x): 42.7 box / 39.3 mask AP.
_base_ = [
    'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    './_base_/stage1_detection.py',
]
load_from = (
    'https://download.openmmlab.com/mmdetection/v2.0/swin/'
    'mask_rcnn_swin-t-p4-w7_fpn_1x_coco/'
    'mask_rcnn_swin-t-p4-w7_fpn_1x_coco_20210902_120937-9d6b7cfa.pth')
model = dict(
    type='gplq_mm.GPLQ', float_type='MaskRCNN', recipe=dict(base='w4a4'),
    backbone=dict(init_cfg=None))
train_cfg = _base_.stage1_loop
default_hooks = dict(checkpoint=_base_.stage1_checkpoint)
optim_wrapper = dict(_delete_=True, constructor='gplq_mm.GPLQOptimWrapperConstructor')
param_scheduler = _base_.stage1_scheduler
