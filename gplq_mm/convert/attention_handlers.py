# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Common parts of attention handlers, and the handler of ``nn.MultiheadAttention``."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..ops import swap_class
from ..ops.attention.multihead import (
    PARTS,
    InProjection,
    QuantInProjection,
    QuantMultiheadAttention,
    QuantOutProjection,
)
from ..ops.attention.relative_position import (
    FloatRelPosMatMul,
    QuantRelPosMatMul,
    SharedQueryMatMul,
)
from ..ops.float_matmul import FloatMatMul
from .handlers import (
    TURNED_OFF,
    Context,
    convert_layer,
    make_matmul,
    register_handler,
    register_layer,
)
from .roles import child_name, register_roles

_REL_POS = {'rel_h_matmul': 'bnhwc,hkc->bnhwk', 'rel_w_matmul': 'bnhwc,wkc->bnhwk'}


def attach_matmuls(module: Any, name: str, context: Context, heads: int) -> None:
    """Add ``qk_matmul`` and ``pv_matmul`` to an attention module.

    Args:
        module: Attention; its forward calls both with ``(B, heads, N, D)`` operands.
        name: Its dotted name.
        context: The current conversion.
        heads: Number of heads.
    """
    for child, roles in (('qk_matmul', ('query', 'key')), ('pv_matmul', ('softmax', 'value'))):
        matmul = make_matmul(child_name(name, child), context, roles, heads)
        setattr(module, child, FloatMatMul() if matmul is None else matmul)


POSITION_MLP = {'cpb_mlp': 'acts on a constant table: a deployed model stores its output'}
"""Reason in the report for the float part of Swin V2's attention."""


def register_attention(
    quantized: Mapping[type[nn.Module], type[nn.Module]],
    kept_float: Mapping[str, str] | None = None,
) -> None:
    """Register handlers of attention classes, which add both matmuls; projections are children.

    Args:
        quantized: Maps a class to a subclass whose forward calls ``qk_matmul`` and
            ``pv_matmul``. The modules have ``num_heads``.
        kept_float: Names of children that stay float, with the reason.
    """

    @register_handler(*quantized)
    def convert_attention(module: Any, name: str, context: Context) -> None:
        swap_class(module, quantized[type(module)])
        attach_matmuls(module, name, context, module.num_heads)
        for child, reason in (kept_float or {}).items():
            context.skip(child_name(name, child), reason)


def attach_rel_pos_matmuls(module: Any, name: str, context: Context) -> None:
    """Add the matmuls that ``RelPosAttention`` calls to an attention module.

    Args:
        module: Attention with ``num_heads`` and ``use_rel_pos``.
        name: Its dotted name.
        context: The current conversion.
    """
    attach_matmuls(module, name, context, module.num_heads)
    is_quantized = not module.qk_matmul.is_float
    if is_quantized:
        swap_class(module.qk_matmul, SharedQueryMatMul)
    if not module.use_rel_pos:
        return
    for child, equation in _REL_POS.items():
        path = child_name(name, child)
        table = context.activation(f'{path}.rhs', 'rel_pos', None, None)
        if table is None or not is_quantized:
            context.keep_float(path, TURNED_OFF)
            setattr(module, child, FloatRelPosMatMul(equation))
        else:
            context.count('matmul', path)
            query = module.qk_matmul.lhs_quantizer
            setattr(module, child, QuantRelPosMatMul(equation, query, table))


@register_handler(nn.MultiheadAttention)
def convert_multihead_attention(module: nn.MultiheadAttention, name: str, context: Context) -> None:
    """Quantize three input projections and both matmuls; ``out_proj`` has its own handler."""
    swap_class(module, QuantMultiheadAttention)
    for part in PARTS:
        child = f'in_proj_{part}'
        layer = InProjection(module, part)
        setattr(module, child, layer)
        convert_layer(layer, child_name(name, child), context, QuantInProjection)
    attach_matmuls(module, name, context, module.num_heads)


register_layer(NonDynamicallyQuantizableLinear, QuantOutProjection)


@register_handler(nn.TransformerEncoderLayer)
def convert_encoder_layer(module: Any, name: str, context: Context) -> None:
    """Turn off torch's fused kernel, which would bypass the quantized child modules."""
    module.activation_relu_or_gelu = 0  # torch checks this before it uses the kernel


@register_roles(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
def give_ffn_role(module: Any, name: str, context: Context) -> None:
    """Set ``post_gelu`` or ``post_relu`` for the second layer of the feed-forward network."""
    function = module.activation
    for role, kinds in (('post_gelu', (F.gelu, nn.GELU)), ('post_relu', (F.relu, nn.ReLU))):
        if function is kinds[0] or isinstance(function, kinds[1]):
            context.set_role(child_name(name, 'linear2'), role)
