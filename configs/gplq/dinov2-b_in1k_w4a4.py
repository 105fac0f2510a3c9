# DINOv2-B/14, 224 px, ImageNet-1k. The zoo has its backbone without a head: train the linear head
# by the first base with `python tools/train.py`, or give yours by --cfg-options load_from=...
_base_ = [
    './_base_/dinov2-b_imagenet.py',
    './_base_/stage1_classification.py',
]
data_root = 'data/imagenet'
load_from = 'checkpoints/dinov2-b_imagenet.pth'
model = dict(
    type='gplq_mm.GPLQ', float_type='ImageClassifier', recipe=dict(base='w4a4'), train_cfg=None,
    backbone=dict(frozen_stages=-1))
train_cfg = dict(_delete_=True, **_base_.stage1_loop)
train_dataloader = dict(batch_size=128)
custom_hooks = _base_.stage1_hooks
default_hooks = dict(checkpoint=_base_.stage1_checkpoint)
optim_wrapper = dict(_delete_=True, constructor='gplq_mm.GPLQOptimWrapperConstructor')
param_scheduler = _base_.stage1_scheduler
auto_scale_lr = dict(base_batch_size=128)
randomness = dict(_delete_=True, seed=0)
