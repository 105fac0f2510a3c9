# Handwritten digits on canvases, created by tools/dataset_converters/digits_to_coco.py.
data_root = 'data/digits/'
dataset = dict(type='CocoDataset', data_root=data_root, metainfo=dict(
    classes=tuple('0123456789'),
    palette=[(230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48),
             (145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212)]))
annotations = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
pack = dict(type='PackDetInputs',
            meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
train_pipeline = [dict(type='LoadImageFromFile'), annotations, pack]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(160, 160)),
                 annotations, pack]
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(ann_file='annotations/instances_train.json', data_prefix=dict(img='train/'),
                 pipeline=train_pipeline, **dataset))
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(ann_file='annotations/instances_val.json', data_prefix=dict(img='val/'),
                 test_mode=True, pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', metric=['bbox', 'segm'],
                     ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator
val_cfg, test_cfg, randomness = dict(type='ValLoop'), dict(type='TestLoop'), dict(seed=0)
