# DeiT III-S, ImageNet-1k. Float (its paper): 81.4 top-1. `load_from` is the file
# `python tools/model_converters/timm_to_mmpretrain.py` writes for its public checkpoint,
# https://dl.fbaipublicfiles.com/deit/deit_3_small_224_1k.pth, with --config THIS_CONFIG.
_base_ = [
    './_base_/deit3-s_imagenet.py',
    './_base_/stage1_classification.py',
]
data_root = 'data/imagenet'
load_from = 'checkpoints/deit_3_small_224_1k.pth'
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
