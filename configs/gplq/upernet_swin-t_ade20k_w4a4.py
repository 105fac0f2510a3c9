# UPerNet, Swin-T, ADE20K. Float (OpenMMLab zoo): 44.41 mIoU.
_base_ = [
    'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    './_base_/stage1_segmentation.py',
]
load_from = (
    'https://download.openmmlab.com/mmsegmentation/v0.5/'
    'swin/'
    'upernet_swin_tiny_patch4_window7_512x512_160k_ade20k_pretrain_224x224_1K/'
    'upernet_swin_tiny_patch4_window7_512x512_160k_ade20k_pretrain_224x224_1K_20210531_112542-e380ad3e.pth')
model = dict(
    type='gplq_mm.GPLQ', float_type='EncoderDecoder', recipe=dict(base='w4a4'),
    backbone=dict(init_cfg=None))
train_dataloader = dict(sampler=_base_.stage1_sampler)
train_cfg = dict(_delete_=True, **_base_.stage1_loop)
default_hooks = _base_.stage1_hooks
log_processor = dict(by_epoch=True)
optim_wrapper = dict(_delete_=True, constructor='gplq_mm.GPLQOptimWrapperConstructor')
param_scheduler = _base_.stage1_scheduler
