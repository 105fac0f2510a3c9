# Swin-T fine-tuned on FGVC-Aircraft: give its FP32 checkpoint
# with --cfg-options load_from=PATH. Another backbone: replace the first base by its config.
# The data sets are small: ten epochs take minutes.
_base_ = [
    './_base_/swin-t.py',
    './_base_/aircraft.py',
    './_base_/stage1_classification.py',
]
load_from = None
model = dict(
    type='gplq_mm.GPLQ', float_type='ImageClassifier', recipe=dict(base='w4a4'), train_cfg=None,
    head=dict(num_classes=_base_.num_classes))
train_cfg = dict(_delete_=True, type='gplq_mm.ResumableEpochLoop', max_epochs=10, val_interval=5)
custom_hooks = _base_.stage1_hooks
default_hooks = dict(checkpoint=_base_.stage1_checkpoint)
optim_wrapper = dict(_delete_=True, constructor='gplq_mm.GPLQOptimWrapperConstructor')
param_scheduler = _base_.stage1_scheduler
auto_scale_lr = dict(base_batch_size=64)
randomness = dict(_delete_=True, seed=0)
