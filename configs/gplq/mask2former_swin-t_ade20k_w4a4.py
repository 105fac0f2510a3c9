# Mask2Former, Swin-T, ADE20K. Float (OpenMMLab zoo): 48.66 mIoU.
_base_ = [
    'mmseg::mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py',
    './_base_/stage1_segmentation.py',
]
load_from = (
    'https://download.openmmlab.com/mmsegmentation/v0.5/'
    'mask2former/'
    'mask2former_swin-t_8xb2-160k_ade20k-512x512/'
    'mask2former_swin-t_8xb2-160k_ade20k-512x512_20221203_234230-7d64e5dd.pth')
model = dict(
    type='gplq_mm.GPLQ', float_type='EncoderDecoder', recipe=dict(base='w4a4'),
    backbone=dict(init_cfg=None))
train_dataloader = dict(sampler=_base_.stage1_sampler)
train_cfg = dict(_delete_=True, **_base_.stage1_loop)
default_hooks = _base_.stage1_hooks
log_processor = dict(by_epoch=True)
optim_wrapper = dict(_delete_=True, constructor='gplq_mm.GPLQOptimWrapperConstructor')
param_scheduler = _base_.stage1_scheduler
