# SegFormer-B2, Cityscapes. Float (OpenMMLab zoo): 81.08 mIoU.
_base_ = [
    'mmseg::segformer/segformer_mit-b2_8xb1-160k_cityscapes-1024x1024.py',
    './_base_/stage1_segmentation.py',
]
load_from = (
    'https://download.openmmlab.com/mmsegmentation/v0.5/'
    'segformer/'
    'segformer_mit-b2_8x1_1024x1024_160k_cityscapes/'
    'segformer_mit-b2_8x1_1024x1024_160k_cityscapes_20211207_134205-6096669a.pth')
model = dict(
    type='gplq_mm.GPLQ', float_type='EncoderDecoder', recipe=dict(base='w4a4'),
    backbone=dict(init_cfg=None))
train_dataloader = dict(sampler=_base_.stage1_sampler)
train_cfg = dict(_delete_=True, **_base_.stage1_loop)
default_hooks = _base_.stage1_hooks
log_processor = dict(by_epoch=True)
optim_wrapper = dict(_delete_=True, constructor='gplq_mm.GPLQOptimWrapperConstructor')
param_scheduler = _base_.stage1_scheduler
