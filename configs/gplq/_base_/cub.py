# CUB-200-2011: birds, 5994 images to train on, 5794 to test.
_base_ = './fine_grained.py'
num_classes = 200
data_root = 'data/CUB_200_2011'
train_dataloader = dict(dataset=dict(
    type='CUB', data_root=data_root, split='train'))
val_dataloader = test_dataloader = dict(dataset=dict(
    type='CUB', data_root=data_root, split='test'))
