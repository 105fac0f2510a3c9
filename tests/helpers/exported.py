# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Finished models for the tests of exports."""

import functools

import torch
from torch import Tensor, nn

import gplq_mm
from gplq_mm.ops import QuantMatMul
from gplq_mm.quantizers import FakeQuantizer, PerChannel, PerRow, PerTensor, QuantSpec
from tests.helpers.layers import quantized
from tests.helpers.plain_vit import pixels, plain_vit
from tests.helpers.reference import calibrated


@functools.lru_cache
def finished_vit(recipe: str = 'w4a4') -> nn.Module:
    """The plain ViT after stage 2; shared, so tests must not change it."""
    model = plain_vit()
    gplq_mm.quantize(model, recipe)
    gplq_mm.calibrate(model, [pixels()])
    gplq_mm.quantize_weights(model, [pixels()])
    return model.eval()


class Layers(nn.Module):
    """Layers with every kind of input quantizer on `(B, 3, 8, 8)`; a tuple of outputs."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        tokens = self.tokens(images)
        self.linear = nn.ModuleDict()
        for name, bits, scheme, per_channel in (
            ('tensor', (4, 4), (True, False), False),
            ('channel', (3, 4), (True, False), True),
            ('bytes', (8, 8), (True, False), True),
            ('symmetric', (2, 3), (True, True), True),
            ('unsigned', (4, 8), (False, False), False),
        ):
            self.linear[name] = quantized(nn.Linear(24, 10), tokens, bits, scheme, per_channel)
        self.conv = nn.ModuleDict()
        for name, bits, per_channel, options in (
            ('patch', (8, 8), False, dict(stride=2)),
            ('padded', (4, 4), True, dict(padding=1)),
            ('grouped', (4, 4), False, dict(groups=3, padding=1, bias=False)),
            ('padded_bytes', (8, 8), True, dict(padding=1)),
            ('reflected', (4, 4), False, dict(padding=1, padding_mode='reflect')),
        ):
            layer = nn.Conv2d(3, 6, 2, **options)
            self.conv[name] = quantized(layer, images, bits, (True, False), per_channel)

    def tokens(self, images: Tensor) -> Tensor:
        """`(B, 8, 24)`, channels of different size."""
        return images.flatten(2).reshape(-1, 8, 24) * torch.linspace(0.1, 3, 24) + 0.2

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens = self.tokens(images)
        linear = (layer(tokens) for layer in self.linear.values())
        return (*linear, *(layer(images) for layer in self.conv.values()))


class Products(nn.Module):
    """Attention products with every kind of quantizer on `(B, 3, 8, 8)`; a tuple of outputs."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.products = nn.ModuleDict()
        lhs, rhs = self.operands(images)
        for name, bits, scheme in (
            ('tensor', 4, (True, False)),
            ('head', 4, (True, False)),
            ('row', 4, (True, False)),
            ('row_symmetric', 3, (True, True)),
            ('row_bytes', 8, (True, False)),
            ('symmetric_bytes', 8, (True, True)),
        ):
            self.products[name] = QuantMatMul(
                _quantizer(name, lhs, bits, scheme, -1), _quantizer(name, rhs, bits, scheme, -2)
            )
        self.log = nn.ModuleDict()
        logarithmic = (('log2', 'log2', 4), ('small', 'log2', 3), ('sqrt', 'log_sqrt2', 4))
        for name, codes, bits in logarithmic:
            spec = QuantSpec(bits, False, True, granularity=PerRow(-1), codes=codes)
            probabilities = FakeQuantizer(spec)
            probabilities.set_qparams(
                torch.tensor(0.98 / int(probabilities.levels[-1])), torch.tensor(0.0)
            )
            value = _quantizer('row', rhs, 4, (True, False), -2)
            self.log[name] = QuantMatMul(probabilities, value)

    def operands(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, 3, 8, 8)` and `(B, 3, 8, 8)`."""
        return images + 0.3, (images * 1.7).transpose(-2, -1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        lhs, rhs = self.operands(images)
        weights = lhs.abs() * lhs.abs() * lhs.abs()  # products are rounded alike everywhere
        uniform = (product(lhs, rhs) for product in self.products.values())
        return (*uniform, *(product(weights, rhs) for product in self.log.values()))


def _quantizer(
    name: str, x: Tensor, bits: int, scheme: tuple[bool, bool], axis: int
) -> FakeQuantizer:
    if name.startswith('row'):
        quantizer = FakeQuantizer(QuantSpec(bits, *scheme, granularity=PerRow(axis)))
        share = 0.9 / (2**bits - 1 if not scheme[1] else 2 ** (bits - 1) - 1)
        quantizer.set_qparams(torch.tensor(share), torch.tensor(0.0))
        return quantizer
    granularity = PerChannel(1) if name == 'head' else PerTensor()
    spec = QuantSpec(bits, *scheme, granularity=granularity)
    return calibrated(FakeQuantizer(spec, x.shape[1] if name == 'head' else None), x)
