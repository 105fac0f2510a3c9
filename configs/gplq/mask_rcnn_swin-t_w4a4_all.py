# The whole detector in 4 bit, as in post-training papers: backbone, neck, RPN, RoI heads.
_base_ = './mask_rcnn_swin-t_w4a4.py'
model = dict(recipe=dict(scope='all'))
