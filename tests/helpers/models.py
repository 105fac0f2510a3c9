# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A miniature detector in plain torch: every kind of thing that a conversion meets."""

from typing import Any

import torch
from torch import Tensor, nn

from gplq_mm.integrations import loading  # noqa: F401  knows where models have heads
from gplq_mm.ops import QuantMatMul


class Attention(nn.Module):
    """One-head attention that looks its products up, so that a handler can replace them."""

    def __init__(self, dims: int = 6) -> None:
        super().__init__()
        self.qkv = nn.Linear(dims, 3 * dims)
        self.proj = nn.Linear(dims, dims)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return self.proj((q @ k.transpose(-2, -1)).softmax(-1) @ v)[:, 0]


class QuantAttention(Attention):
    """What a handler makes of it."""

    qk_matmul: QuantMatMul
    pv_matmul: QuantMatMul

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        weights = self.qk_matmul(q, k.transpose(-2, -1)).softmax(-1)
        return self.proj(self.pv_matmul(weights, v))[:, 0]


class Backbone(nn.Module):
    """Patch embedding, attention, feed-forward network."""

    def __init__(self, attention: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 6, 2, 2)
        self.attn = attention()
        self.ffn = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.attn(tokens)
        return tokens + self.ffn(tokens)


class Detector(nn.Module):
    """`backbone`, `neck`, `bbox_head`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.backbone = Backbone(**kwargs)
        self.neck = nn.ConvTranspose2d(6, 4, 2, 2)
        self.bbox_head = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone(x)
        side = int(tokens.shape[1] ** 0.5)
        return self.bbox_head(self.neck(tokens.transpose(1, 2).unflatten(2, (side, side))))


def image(batch: int = 2) -> Tensor:
    """`(B, 3, 8, 8)`."""
    return torch.randn(batch, 3, 8, 8)
