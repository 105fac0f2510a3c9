# Stanford Cars: 8144 images to train on, 8041 to test.
_base_ = './fine_grained.py'
num_classes = 196
data_root = 'data/Stanford_Cars'
train_dataloader = dict(dataset=dict(
    type='StanfordCars', data_root=data_root, split='train'))
val_dataloader = test_dataloader = dict(dataset=dict(
    type='StanfordCars', data_root=data_root, split='test'))
