# Oxford Flowers-102: 2040 images to train on, 6149 to test.
_base_ = './fine_grained.py'
num_classes = 102
data_root = 'data/Flowers102'
train_dataloader = dict(dataset=dict(
    type='Flowers102', data_root=data_root, split='trainval'))
val_dataloader = test_dataloader = dict(dataset=dict(
    type='Flowers102', data_root=data_root, split='test'))
