# The paper's linear probe: 100 epochs of AdamW at 1e-3, 64 images per step (drop path 0.1 is set
# in the model). The paper gives no schedule and no weight decay: here cosine and torch's default.
_base_ = 'mmpretrain::_base_/default_runtime.py'
train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=10)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True)]
default_hooks = dict(checkpoint=dict(interval=10, max_keep_ckpts=1))
randomness = dict(seed=0)
