# GPLQ of the paper (arXiv 2506.11784): signed per-channel activations, PCA feature mimicking, one
# epoch of AdamW at a constant 5e-6 without decay, 128 images per step (8 GPUs: batch_size=16).
_base_ = './swin-l_in1k_w4a4.py'
model = dict(recipe=dict(base='gplq_w4a4_paper'))
param_scheduler = []
