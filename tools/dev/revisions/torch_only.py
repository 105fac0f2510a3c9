# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Run the functions of `gplq_mm` on a small transformer and write what every step leaves."""

import copy
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gplq_mm

RECIPES: dict[str, Any] = {
    'fused': dict(base='w4a4', calibration=dict(num_images=16)),
    'reference': dict(base='w3a3', calibration=dict(num_images=16), mimic=dict(type='pca')),
}
"""Engine -> recipe."""


class Block(nn.Module):
    """Attention and feed-forward network, normalized before."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dims), nn.LayerNorm(dims)
        self.attn = nn.MultiheadAttention(dims, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dims, 2 * dims), nn.GELU(), nn.Linear(2 * dims, dims))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """`(B, 3, 8, 8)` -> `(B, 3)`."""

    def __init__(self, dims: int = 16) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dims, 2, 2)
        self.blocks = nn.Sequential(Block(dims), Block(dims))
        self.norm, self.head = nn.LayerNorm(dims), nn.Linear(dims, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies, so that later steps do not change them."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def run(engine: str, recipe: Any) -> dict[str, Any]:
    """State dict, losses and outputs of each step, in order."""
    torch.manual_seed(0)
    model, x = ViT(), torch.randn(16, 3, 8, 8)
    pairs = [(part, part.mean((1, 2, 3)).gt(0).long()) for part in x.split(4)]
    teacher, results = copy.deepcopy(model), {}
    results['coverage'] = gplq_mm.quantize(model, recipe, engine=engine).as_dict()
    gplq_mm.calibrate(model, x.split(4))
    results['calibrated'] = state_of(model)
    mimic, results['losses'] = gplq_mm.distill(model, teacher, x.split(4)), []
    optimizer = gplq_mm.stage1_optimizer(model, len(pairs))
    for images, labels in pairs:
        loss = mimic(images) + F.cross_entropy(mimic.output, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        results['losses'].append(loss.detach())
    results['gradients'] = {name: p.grad for name, p in model.named_parameters()}
    results['distilled'] = state_of(model)
    results['mean losses'] = gplq_mm.train_stage1(model, teacher, pairs, epochs=2)
    results['stage1'] = state_of(model)
    gplq_mm.save(model, f'{engine}_stage1.pth')
    results['stage1 file'] = torch.load(f'{engine}_stage1.pth', weights_only=True)
    gplq_mm.quantize_weights(model, x.split(4))
    gplq_mm.save(model, f'{engine}_final.pth')
    results['final file'] = torch.load(f'{engine}_final.pth', weights_only=True)
    loaded = gplq_mm.load(f'{engine}_final.pth', ViT())
    with torch.no_grad():
        results['outputs'] = [loaded(x), model.eval()(x)]
    return results


if __name__ == '__main__':
    torch.save({engine: run(engine, recipe) for engine, recipe in RECIPES.items()}, sys.argv[1])
