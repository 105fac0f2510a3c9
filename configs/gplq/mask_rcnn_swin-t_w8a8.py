_base_ = './mask_rcnn_swin-t_w4a4.py'
model = dict(recipe='w8a8')
