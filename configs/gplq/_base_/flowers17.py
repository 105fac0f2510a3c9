# Oxford Flowers-17 as folders of images: 1020 to train on, 340 to test.
_base_ = './fine_grained.py'
num_classes = 17
data_root = 'data/flowers17'
train_dataloader = dict(dataset=dict(
    type='CustomDataset', data_root=data_root, data_prefix='train'))
val_dataloader = test_dataloader = dict(dataset=dict(
    type='CustomDataset', data_root=data_root, data_prefix='test'))
