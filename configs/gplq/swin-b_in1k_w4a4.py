# Swin-B, pretrained on ImageNet-22k, ImageNet-1k. Float (OpenMMLab zoo): 85.16 top-1.
_base_ = [
    'mmpretrain::swin_transformer/swin-base_16xb64_in1k.py',
    './_base_/stage1_classification.py',
]
data_root = 'data/imagenet'
load_from = (
    'https://download.openmmlab.com/mmclassification/v0/swin-transformer/convert/'
    'swin_base_patch4_window7_224_22kto1k-f967f799.pth')
model = dict(
    type='gplq_mm.GPLQ', float_type='ImageClassifier', recipe=dict(base='w4a4'), train_cfg=None)
train_cfg = dict(_delete_=True, **_base_.stage1_loop)
train_dataloader = dict(batch_size=128)
custom_hooks = _base_.stage1_hooks
default_hooks = dict(checkpoint=_base_.stage1_checkpoint)
optim_wrapper = dict(_delete_=True, constructor='gplq_mm.GPLQOptimWrapperConstructor')
param_scheduler = _base_.stage1_scheduler
auto_scale_lr = dict(base_batch_size=128)
randomness = dict(_delete_=True, seed=0)
