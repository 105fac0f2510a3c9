# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A linear layer on integers: quantization, product, rescaling and bias in one call."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from ...dispatch import register_backend
from .. import exact
from . import kernels
from .layer_weight import SHAPES_DO_NOT_FIT, accepted_weight, layer_weight, refusal_of_call


def refusal(layer: Any, x: Tensor, bias: Tensor | None) -> str:
    """Why a call is refused; empty if it is computed here."""
    reason = refusal_of_call(layer, x, bias)
    if reason:
        return reason
    if not x.dim() or x.shape[-1] != layer.in_features:
        return SHAPES_DO_NOT_FIT
    if bias is not None and bias.shape != (layer.out_features,):
        return SHAPES_DO_NOT_FIT
    weight = layer_weight(layer, arrange)
    return weight if isinstance(weight, str) else ''


def arrange(layer: Any, codes: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, int]:
    """``(out, in)`` codes, zero points of the input channels, one column per output channel."""
    return codes, zero.expand(codes.shape[1]), 1


def linear(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """``layer.reference(x, bias)``, equal to ``exact.linear`` bit for bit.

    Args:
        layer: Layer whose quantizers are active.
        x: ``(..., in)``.
        bias: ``(out,)``, or None.

    Returns:
        ``(..., out)``.
    """
    weight = accepted_weight(layer, arrange)
    matrix, depth = weight.matrix, x.shape[-1]
    rows = x.contiguous()
    number = rows.numel() // max(depth, 1)
    out = torch.empty(*x.shape[:-1], matrix.columns)
    bias = None if bias is None else bias.contiguous()
    status = kernels.loaded().linear(
        ctypes.byref(weight.grid),
        ctypes.byref(kernels.product(matrix, number, weight.factor, bias, out)),
        kernels.Pointer(rows.data_ptr()),
        ctypes.c_int64(depth),
        kernels.workspace(number * matrix.layout.groups * 4),
        kernels.threads_for(number * depth * matrix.columns),
    )
    if not kernels.completed(status):
        return exact.linear(layer, x, bias)
    return out


register_backend('integer', 'integer', ['linear'], refusal, linear)
