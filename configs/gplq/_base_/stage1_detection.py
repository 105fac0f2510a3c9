# Settings that every GPLQ detector adds to its float config. mmdet's bases define a schedule, so
# the config itself replaces `train_cfg`, `optim_wrapper`, `param_scheduler` and the checkpoint
# hook. An epoch of COCO is long: checkpoints are saved during the epoch and can be resumed.
custom_hooks = [dict(type='gplq_mm.GPLQHook')]
randomness = dict(seed=0)
stage1_loop = dict(type='gplq_mm.ResumableEpochLoop', max_epochs=1, val_interval=1)
stage1_checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=1000, max_keep_ckpts=2)
stage1_scheduler = [dict(type='CosineAnnealingLR', convert_to_iter_based=True)]
