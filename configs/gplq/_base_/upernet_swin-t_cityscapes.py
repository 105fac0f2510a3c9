# UPerNet in float with Swin-T on Cityscapes, from mmseg's bases; no zoo has this model.
_base_ = [
    'mmseg::_base_/models/upernet_swin.py', 'mmseg::_base_/datasets/cityscapes.py',
    'mmseg::_base_/default_runtime.py', 'mmseg::_base_/schedules/schedule_80k.py',
]
model = dict(data_preprocessor=dict(size=(512, 1024)))
