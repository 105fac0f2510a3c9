# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The integers of a quantized model."""

import torch
from torch import Tensor, nn

from gplq_mm.ops import operations


@torch.no_grad()
def export(model: nn.Module) -> dict[str, Tensor]:
    """Codes and scales of all weights, scales and zero points of all activations.

    Args:
        model: After ``gplq_mm.quantize_weights``.

    Returns:
        ``<operation>.<operand>.codes`` (int16: centred 8-bit codes may need nine bits),
        ``.scale`` and ``.zero_point``. A per-channel input scale is folded into the weight; that
        of a per-row operand is the part of a row's range that one step covers.
    """
    tensors = {}
    for name, operation in operations(model).items():
        weights = operation.codes()
        for operand in operation.operands().values():
            key, quantizer = f'{name}.{operand.name}', operand.quantizer
            if operand.weight is None:
                tensors[f'{key}.scale'] = quantizer.scale.detach().clone()
                tensors[f'{key}.zero_point'] = quantizer.zero_point.clone()
            else:
                codes, scale = weights[operand.name]
                tensors[f'{key}.codes'], tensors[f'{key}.scale'] = codes.to(torch.int16), scale
    return tensors
