_base_ = './mask_rcnn_swin-t_w4a4.py'
model = dict(recipe=dict(base='w8a8'))
