# GPLQ W4A4 of the digits detector. `load_from` is the trained float config's checkpoint.
_base_ = './mask_rcnn_vit_digits.py'
load_from = 'work_dirs/demo/float/epoch_5.pth'
model = dict(type='gplq_mm.GPLQ', float_type='MaskRCNN', recipe=dict(base='w4a4'))
custom_hooks = [dict(type='gplq_mm.GPLQHook')]
train_cfg = dict(
    _delete_=True, type='gplq_mm.ResumableEpochLoop', max_epochs=1, val_interval=1)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=25, max_keep_ckpts=2))
optim_wrapper = dict(_delete_=True, constructor='gplq_mm.GPLQOptimWrapperConstructor')
param_scheduler = [dict(type='CosineAnnealingLR', convert_to_iter_based=True)]
