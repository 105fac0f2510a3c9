# Oxford-IIIT Pets: 3680 images to train on, 3669 to test.
_base_ = './fine_grained.py'
num_classes = 37
data_root = 'data/Oxford-IIIT_Pets'
train_dataloader = dict(dataset=dict(
    type='OxfordIIITPet', data_root=data_root, split='trainval'))
val_dataloader = test_dataloader = dict(dataset=dict(
    type='OxfordIIITPet', data_root=data_root, split='test'))
