# What every GPLQ detector adds to its float config. The bases of mmdet define a schedule of their
# own, so `train_cfg`, `optim_wrapper` and `param_scheduler` are replaced in the config itself.
custom_hooks = [dict(type='gplq_mm.GPLQHook')]
randomness = dict(seed=0)
stage1_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=True, convert_to_iter_based=True),
]
