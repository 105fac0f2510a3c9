# What every GPLQ classifier adds to its float config. The bases of mmpretrain define all of these,
# so each config takes them over by name. One epoch of ImageNet is long: it is saved, and can be
# resumed, in the middle. The recipe's learning rates are for 128 images a step, over all GPUs.
# Transforms and losses stay the base's, drop rates are the recipe's affair. Mixup and CutMix go
# (`train_cfg=None`): scales are learned on images as they come at test time, the targets are the
# label and what the teacher says of the same image, and one epoch needs no regularisation.
stage1_hooks = [dict(type='gplq_mm.GPLQHook')]
stage1_loop = dict(type='gplq_mm.ResumableEpochLoop', max_epochs=1, val_interval=1)
stage1_checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=1000, max_keep_ckpts=2)
stage1_scheduler = [dict(type='CosineAnnealingLR', convert_to_iter_based=True)]
