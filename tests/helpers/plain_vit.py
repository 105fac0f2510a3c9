# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A vision transformer in plain torch, small enough to be calibrated and trained in a test."""

import torch
from torch import Tensor, nn


class PlainBlock(nn.Module):
    """Attention and feed-forward network, normalized before."""

    def __init__(self, dims: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dims), nn.LayerNorm(dims)
        self.attn = nn.MultiheadAttention(dims, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dims, 2 * dims), nn.GELU(), nn.Linear(2 * dims, dims))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class PlainViT(nn.Module):
    """`(B, 3, 8, 8)` -> `(B, 3)`; may be given its images by name."""

    def __init__(self, dims: int = 16, heads: int = 2, depth: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dims, 2, 2)
        self.blocks = nn.Sequential(*(PlainBlock(dims, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dims), nn.Linear(dims, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


def plain_vit(seed: int = 0) -> PlainViT:
    """The model with weights of a seed."""
    torch.manual_seed(seed)
    return PlainViT()


def pixels(number: int = 16, seed: int = 1) -> Tensor:
    """`(number, 3, 8, 8)`."""
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
