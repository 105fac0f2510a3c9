# ViT-B/16, pretrained by MAE, ImageNet-1k. Float (OpenMMLab zoo): 83.50 top-1.
_base_ = [
    'mmpretrain::mae/benchmarks/vit-base-p16_8xb128-coslr-100e_in1k.py',
    './_base_/stage1_classification.py',
]
data_root = 'data/imagenet'
load_from = (
    'https://download.openmmlab.com/mmselfsup/1.x/mae/'
    'mae_vit-base-p16_8xb512-fp16-coslr-1600e_in1k/vit-base-p16_ft-8xb128-coslr-100e_in1k/'
    'vit-base-p16_ft-8xb128-coslr-100e_in1k_20220825-cf70aa21.pth')
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
