# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Quantize a small timm ViT for handwritten digits to 4 bits, without any OpenMMLab library."""

import copy
import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer

import gplq_mm

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 30
torch.manual_seed(0)
images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1
order, labels = torch.randperm(len(images)), torch.tensor(load_digits().target)
train, test = order[:1440], order[1440:]
loader = [(images[part], labels[part]) for part in train.split(32)]


def top1(model):
    with torch.no_grad():
        return (model.eval()(images[test]).argmax(1) == labels[test]).float().mean().item() * 100


model = VisionTransformer(8, 2, in_chans=1, num_classes=10, embed_dim=48, depth=3, num_heads=3)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for x, y in loader * epochs:
    optimizer.zero_grad()
    F.cross_entropy(model.train()(x), y).backward()
    optimizer.step()

teacher, scores = copy.deepcopy(model), [top1(model)]
gplq_mm.quantize(model, 'w4a4')
gplq_mm.calibrate(model, loader)
gplq_mm.train_stage1(model, teacher, loader, epochs=max(1, epochs // 4))
scores.append(top1(model))
gplq_mm.quantize_weights(model, loader)
print('FP32 | W32A4 | W4A4:', ' | '.join(f'{s:.1f}' for s in [*scores, top1(model)]))
