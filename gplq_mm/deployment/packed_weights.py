# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The quantized weight of a layer as packed codes, and back with the arithmetic of stage 2."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import quantized_layers
from ..ops import QuantizedLayer
from ..quantizers.fake_quantizer import broadcast_shape
from ..quantizers.functional import dequantize, positive_scale
from .code_bits import pack_codes, unpack_codes


@dataclass(frozen=True)
class WeightForm:
    """How a weight follows from its codes, the weight quantizer's state and the input's scale.

    Attributes:
        num_bits: Bits per code.
        qmin: Lowest code; stored codes are counted from it.
        shape: Shape of the weight.
        scale_shape: Shape in which scale and zero point broadcast to the weight.
        fold_shape: Shape in which a per-channel input scale broadcasts to the weight; empty if the
            input scale is not folded.
        groups: Groups of a convolution, else 1. The input scale of a group repeats for each of
            the group's output channels.
    """

    num_bits: int
    qmin: int
    shape: tuple[int, ...]
    scale_shape: tuple[int, ...]
    fold_shape: tuple[int, ...] = ()
    groups: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Plain data, of which ``WeightForm(**data)`` is the inverse."""
        return asdict(self)

    @classmethod
    def of(cls, layer: QuantizedLayer) -> 'WeightForm':
        """Form of a layer's weight; its quantizers must be calibrated."""
        quantizer, shape = layer.weight_quantizer, layer.weight.shape
        fold: tuple[int, ...] = ()
        if layer.folds_input_scale:
            fold = tuple(layer.input_scale_on_weight().shape)
        scale_shape = broadcast_shape(quantizer.spec.granularity, len(shape))
        groups = getattr(layer, 'groups', 1)
        bits, qmin = quantizer.spec.num_bits, quantizer.spec.quant_range[0]
        return cls(bits, qmin, tuple(shape), scale_shape, fold, groups)

    def restore(
        self, packed: Tensor, scale: Tensor, zero_point: Tensor, input_scale: Tensor | None
    ) -> Tensor:
        """The float weight, by the operations with which stage 2 wrote it.

        Args:
            packed: Packed codes, uint8.
            scale: Scale of the weight quantizer, ``()`` or ``(size,)``.
            zero_point: Its zero point, same shape.
            input_scale: Per-channel scale of the input; used if it is folded.

        Returns:
            float32, ``shape``.
        """
        codes = unpack_codes(packed, self.num_bits, self.shape).float() + self.qmin
        scale, zero_point = scale.view(self.scale_shape), zero_point.view(self.scale_shape)
        folded = dequantize(codes, scale, zero_point)
        if not self.fold_shape:
            return folded
        assert input_scale is not None
        return folded / self._on_weight(positive_scale(input_scale))

    def _on_weight(self, input_scale: Tensor) -> Tensor:
        repeats = math.prod(self.fold_shape) // input_scale.numel()
        if repeats == 1:
            return input_scale.view(self.fold_shape)
        by_group = input_scale.view(self.groups, 1, -1).expand(-1, repeats, -1)
        return by_group.reshape(self.fold_shape)


@torch.no_grad()
def pack_weight(layer: QuantizedLayer) -> tuple[WeightForm, Tensor] | None:
    """Packed codes of a layer's weight.

    Args:
        layer: Layer whose weight quantizer is active.

    Returns:
        Form and codes; None if the weight that they restore differs from ``layer.weight``. The
        sign of a zero may differ: it has no code, and the quantizer ignores it.
    """
    quantizer = layer.weight_quantizer
    if quantizer.spec.is_log or quantizer.follows_rows or layer.weight.dtype != torch.float32:
        return None
    form = WeightForm.of(layer)
    centred = layer.codes()['weight'].codes
    zero_point = quantizer.zero_point.view(form.scale_shape)
    packed = pack_codes(centred + zero_point - form.qmin, form.num_bits).cpu()
    input_scale = layer.input_quantizer.scale.cpu() if form.fold_shape else None
    state = quantizer.scale.cpu(), quantizer.zero_point.cpu()  # a reader restores on the CPU
    restored = form.restore(packed, *state, input_scale)
    return (form, packed) if torch.equal(restored, layer.weight.cpu()) else None


def finished_layers(model: nn.Module) -> Mapping[str, QuantizedLayer]:
    """Layers whose weight quantizer is active, by name: those that stage 2 has finished."""
    layers = quantized_layers(model)
    return {name: layer for name, layer in layers.items() if layer.weight_quantizer.is_active}
