# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Stored checkpoints of small models, written by `tools/dev/write_checkpoint_fixtures.py`."""

import lzma
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[1] / 'checkpoints'
NETWORKS = {
    'vit': (
        'vit_classifier',
        """
arch = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
model = dict(backbone=dict(arch=arch), head=dict(in_channels=16))
""",
    ),
    'detector': (
        'mask_rcnn_swin',
        """
extractor = dict(out_channels=8)
model = dict(
    backbone=dict(embed_dims=8),
    neck=dict(in_channels=[8, 16], out_channels=8),
    rpn_head=dict(in_channels=8, feat_channels=8),
    roi_head=dict(
        bbox_roi_extractor=extractor,
        bbox_head=dict(in_channels=8, fc_out_channels=16),
        mask_roi_extractor=extractor,
        mask_head=dict(in_channels=8, conv_out_channels=8)))
""",
    ),
}
"""Name -> float config among the tests' configs, and what makes it smaller."""
_SUFFIX = '.weight_quantizer.scale'


def unpacked(name: str, folder: Path) -> Path:
    """A stored checkpoint as the file that it was."""
    path = folder / f'{name}.pth'
    path.write_bytes(lzma.decompress((FOLDER / f'{name}.pth.xz').read_bytes()))
    return path


def layers_of(state: dict[str, Tensor]) -> list[str]:
    """Layers with a quantized weight."""
    return [key.removesuffix(_SUFFIX) for key in state if key.endswith(_SUFFIX)]


def codes_of(state: dict[str, Tensor], layer: str) -> Tensor:
    """Codes of a weight after stage 2, int8 `(rows, elements)`; exact on any processor.

    The weight times its input's scales is a multiple of its own scale.
    """
    weight, scale = _weight(state, layer), state[f'{layer}.weight_quantizer.scale']
    of_input = state[f'{layer}.input_quantizer.scale']
    if of_input.dim():
        weight = weight * of_input.view(1, -1, *[1] * (weight.dim() - 2))
    ratio = weight.flatten(1).double() / scale.double()[:, None]
    codes = ratio.round()
    assert float((ratio - codes).abs().max()) < 1e-3, f'{layer} is not on its grid'
    return codes.to(torch.int8)


def _weight(state: dict[str, Tensor], layer: str) -> Tensor:
    """A layer's weight; a third of `in_proj_weight` in torch's multi-head attention."""
    attention, found, part = layer.rpartition('in_proj_')
    if not found:
        return state[f'{layer}.weight']
    return state[f'{attention}in_proj_weight'].chunk(3)['qkv'.index(part)]
