_base_ = './swin-t_in1k_w4a4.py'
model = dict(recipe=dict(base='w8a8'))
