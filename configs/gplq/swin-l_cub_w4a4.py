# Swin-L fine-tuned on CUB-200-2011, 384 px. Float (OpenMMLab zoo): 91.87 top-1.
_base_ = [
    'mmpretrain::swin_transformer/swin-large_8xb8_cub-384px.py',
    './_base_/stage1_classification.py',
]
data_root = 'data/CUB_200_2011'
load_from = (
    'https://download.openmmlab.com/mmclassification/v0/swin-transformer/'
    'swin-large_8xb8_cub_384px_20220307-1bbaee6a.pth')
model = dict(
    type='gplq_mm.GPLQ', float_type='ImageClassifier', recipe=dict(base='w4a4'), train_cfg=None)
train_cfg = dict(_delete_=True, type='gplq_mm.ResumableEpochLoop', max_epochs=10, val_interval=5)
custom_hooks = _base_.stage1_hooks
default_hooks = dict(checkpoint=_base_.stage1_checkpoint)
optim_wrapper = dict(_delete_=True, constructor='gplq_mm.GPLQOptimWrapperConstructor')
param_scheduler = _base_.stage1_scheduler
auto_scale_lr = dict(base_batch_size=64)
randomness = dict(_delete_=True, seed=0)
