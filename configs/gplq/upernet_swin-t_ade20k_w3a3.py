_base_ = './upernet_swin-t_ade20k_w4a4.py'
model = dict(recipe=dict(base='w3a3'))
