# What every GPLQ detector adds to its float config. The bases of mmdet define a schedule of their
# own, so the config itself replaces `train_cfg`, `optim_wrapper`, `param_scheduler` and the
# checkpoint hook. An epoch of COCO is long: it is saved, and can be resumed, in the middle.
custom_hooks = [dict(type='gplq_mm.GPLQHook')]
randomness = dict(seed=0)
stage1_loop = dict(type='gplq_mm.ResumableEpochLoop', max_epochs=1, val_interval=1)
stage1_checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=1000, max_keep_ckpts=2)
stage1_scheduler = [dict(type='CosineAnnealingLR', convert_to_iter_based=True)]
