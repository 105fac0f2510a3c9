# FGVC-Aircraft, variants: 6667 images to train on, 3333 to test.
_base_ = './fine_grained.py'
num_classes = 100
data_root = 'data/fgvc-aircraft-2013b'
train_dataloader = dict(dataset=dict(
    type='FGVCAircraft', data_root=data_root, split='trainval'))
val_dataloader = test_dataloader = dict(dataset=dict(
    type='FGVCAircraft', data_root=data_root, split='test'))
