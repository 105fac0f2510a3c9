# Mask R-CNN, Swin-T, COCO. Float (OpenMMLab zoo, 3x): 46.0 box / 41.6 mask AP.
_base_ = [
    'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py',
    './_base_/stage1_detection.py',
]
load_from = (
    'https://download.openmmlab.com/mmdetection/v2.0/swin/'
    'mask_rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco/'
    'mask_rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco_20210906_131725-bacf6f7b.pth')
model = dict(
    type='gplq_mm.GPLQ', float_type='MaskRCNN', recipe=dict(base='w4a4'),
    backbone=dict(init_cfg=None))
train_cfg = _base_.stage1_loop
default_hooks = dict(checkpoint=_base_.stage1_checkpoint)
optim_wrapper = dict(_delete_=True, constructor='gplq_mm.GPLQOptimWrapperConstructor')
param_scheduler = _base_.stage1_scheduler
