# Settings that every GPLQ classifier adds to its float config. mmpretrain's bases define all of
# them, so each config imports them by name. One epoch of ImageNet is long: checkpoints are saved
# during the epoch and can be resumed. The recipe's learning rates are for 128 images per step, over
# all GPUs. Transforms and losses are the base's; the recipe sets drop rates. Mixup and CutMix are
# off (`train_cfg=None`): scales are learned on images as in a test, the targets are the label and
# the teacher's output for the same image, and one epoch needs no regularisation.
stage1_hooks = [dict(type='gplq_mm.GPLQHook')]
stage1_loop = dict(type='gplq_mm.ResumableEpochLoop', max_epochs=1, val_interval=1)
stage1_checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=1000, max_keep_ckpts=2)
stage1_scheduler = [dict(type='CosineAnnealingLR', convert_to_iter_based=True)]
