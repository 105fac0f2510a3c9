# Settings that every GPLQ segmentor adds to its float config. mmseg's bases count iterations and
# define a schedule, so the config itself replaces loop, sampler, hooks, `optim_wrapper` and
# `param_scheduler`: one epoch, with checkpoints during it that can be resumed.
custom_hooks = [dict(type='gplq_mm.GPLQHook')]
randomness = dict(seed=0)
stage1_loop = dict(type='gplq_mm.ResumableEpochLoop', max_epochs=1, val_interval=1)
stage1_sampler = dict(type='DefaultSampler', shuffle=True)
stage1_hooks = dict(
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=500, max_keep_ckpts=2),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=True))
stage1_scheduler = [dict(type='CosineAnnealingLR', convert_to_iter_based=True)]
