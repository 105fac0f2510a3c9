# The whole segmentor in 4 bit: backbone and decode head, its classifier in 8 bit.
_base_ = './upernet_swin-t_ade20k_w4a4.py'
model = dict(recipe=dict(_delete_=True, base='w4a4', scope='all'))
