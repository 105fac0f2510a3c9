# Mask2Former, Swin-T, Cityscapes. Float (OpenMMLab zoo): 81.71 mIoU.
_base_ = [
    'mmseg::mask2former/mask2former_swin-t_8xb2-90k_cityscapes-512x1024.py',
    './_base_/stage1_segmentation.py',
]
load_from = (
    'https://download.openmmlab.com/mmsegmentation/v0.5/'
    'mask2former/'
    'mask2former_swin-t_8xb2-90k_cityscapes-512x1024/'
    'mask2former_swin-t_8xb2-90k_cityscapes-512x1024_20221127_144501-36c59341.pth')
model = dict(
    type='gplq_mm.GPLQ', float_type='EncoderDecoder', recipe=dict(base='w4a4'),
    backbone=dict(init_cfg=None))
train_dataloader = dict(sampler=_base_.stage1_sampler)
train_cfg = dict(_delete_=True, **_base_.stage1_loop)
default_hooks = _base_.stage1_hooks
log_processor = dict(by_epoch=True)
optim_wrapper = dict(_delete_=True, constructor='gplq_mm.GPLQOptimWrapperConstructor')
param_scheduler = _base_.stage1_scheduler
