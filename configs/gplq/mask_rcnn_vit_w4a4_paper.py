# GPLQ of the paper (arXiv 2506.11784): signed per-channel activations, one image per GPU, one epoch
# of AdamW at a constant 5e-6 without weight decay (the recipe's own).
_base_ = './mask_rcnn_vit_w4a4.py'
model = dict(recipe=dict(base='gplq_w4a4_paper'))
train_dataloader = dict(batch_size=1)
param_scheduler = []
