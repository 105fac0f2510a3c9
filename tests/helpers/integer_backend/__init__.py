# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A backend as another project would write it: a folder, no edit of the package.

It multiplies the codes of linear layers in int64, and keeps what an exporter would write.
"""

from typing import Any

import torch
from torch import Tensor

from gplq_mm.ops import register_backend, unregister_backend
from gplq_mm.ops.dispatch import not_quantized

NAME = 'integer'
EXPORTED: list[dict[str, Tensor]] = []


def refusal(layer: Any, x: Tensor, bias: Tensor | None) -> str:
    """Layers whose input scale is folded into the weight are left to others."""
    if layer.folds_input_scale:
        return 'one input scale a channel'
    return not_quantized(layer.quantizers)


def linear(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """The layer in int64."""
    codes = layer.codes(x)
    (left, input_scale), (right, weight_scale) = codes['input'], codes['weight']
    EXPORTED.append({'codes': right.to(torch.int8), 'scale': weight_scale, 'input': input_scale})
    total = left.long() @ right.long().t()
    out = total.float() * layer.output_scale(weight_scale, input_scale)
    return out if bias is None else out + bias


def register() -> None:
    """Take part in the choice."""
    register_backend(NAME, 'inference', ['linear'], refusal, linear)


def unregister() -> None:
    """Stop."""
    unregister_backend(NAME)
    EXPORTED.clear()
