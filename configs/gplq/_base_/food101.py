# Food-101: 75750 images to train on, 25250 to test.
_base_ = './fine_grained.py'
num_classes = 101
data_root = 'data/food-101'
train_dataloader = dict(dataset=dict(
    type='Food101', data_root=data_root, split='train'))
val_dataloader = test_dataloader = dict(dataset=dict(
    type='Food101', data_root=data_root, split='test'))
