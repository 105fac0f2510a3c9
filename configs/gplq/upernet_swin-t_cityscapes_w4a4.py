# UPerNet, Swin-T, Cityscapes. No zoo has this model: train the float config (the first base), or
# give yours by --cfg-options load_from=...
_base_ = [
    './_base_/upernet_swin-t_cityscapes.py',
    './_base_/stage1_segmentation.py',
]
load_from = 'checkpoints/upernet_swin-t_cityscapes.pth'
model = dict(
    type='gplq_mm.GPLQ', float_type='EncoderDecoder', recipe=dict(base='w4a4'),
    backbone=dict(init_cfg=None))
train_dataloader = dict(sampler=_base_.stage1_sampler)
train_cfg = dict(_delete_=True, **_base_.stage1_loop)
default_hooks = _base_.stage1_hooks
log_processor = dict(by_epoch=True)
optim_wrapper = dict(_delete_=True, constructor='gplq_mm.GPLQOptimWrapperConstructor')
param_scheduler = _base_.stage1_scheduler
