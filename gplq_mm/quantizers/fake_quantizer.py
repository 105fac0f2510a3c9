# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""FakeQuantizer: quantized values and codes of a tensor, and its packed codes for training."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compat.torch import TensorState
from .functional import positive_scale
from .learned_scale import (
    centered_codes_ste,
    fake_quantize_ste,
    level_codes_ste,
    positive_scale_ste,
    scale_gradient,
)
from .packing import cpu_kernels, torch_passes
from .quantizer_state import QuantizerState, UncalibratedError
from .row_range import ROW_SLACK, row_extent, row_scale, row_zero_point
from .spec import Granularity, PerChannel, PerRow, QuantSpec


class Grid(NamedTuple):
    """Allowed codes, and the range of values that get gradients.

    Attributes:
        qmin: Smallest code.
        qmax: Largest code.
        zero_point: Code of real zero: a number, or a tensor that broadcasts.
        slack: Steps by which a value may lie outside the codes and still be in range: 0 as in
            LSQ, 0.5 where each vector has its own range (``PerRow``).
        levels: Table of integers of a logarithmic code; None for uniform codes.
    """

    qmin: int
    qmax: int
    zero_point: float | Tensor
    slack: float = 0.0
    levels: Tensor | None = None

    @property
    def is_narrow(self) -> bool:
        """Whether a code fits into half a byte."""
        return self.qmax - self.qmin < 16

    @property
    def offset(self) -> int:
        """Added to a code so that it fits into a signed half byte or byte."""
        if self.qmin < 0:
            return 0
        return -8 if self.is_narrow else -128

    @property
    def bounds(self) -> tuple[float | Tensor, float | Tensor]:
        """Exclusive bounds of ``x / scale``."""
        low, high = self.qmin - self.zero_point, self.qmax - self.zero_point
        return low - self.slack, high + self.slack


class Steps(NamedTuple):
    """Scale and codes of one tensor.

    Attributes:
        scale: Positive, broadcasts to the tensor.
        grid: Allowed codes.
    """

    scale: Tensor
    grid: Grid


class PackedForm(NamedTuple):
    """How a quantizer packs one tensor; its scale parameter is a separate argument.

    Attributes:
        grid: Allowed codes.
        shape: Shape in which the scale broadcasts to the tensor.
        factor: LSQ's factor of the scale's gradient.
        rows: Spec of a quantizer with a scale per vector (``PerRow``), else None.
    """

    grid: Grid
    shape: tuple[int, ...]
    factor: float
    rows: QuantSpec | None = None

    def steps(self, x: Tensor, parameter: Tensor) -> Steps:
        """Scale and codes for a tensor.

        Args:
            x: The tensor, float32, of any shape.
            parameter: Scale of the quantizer, ``()`` or ``(size,)``.
        """
        share = positive_scale(parameter)
        if self.rows is None:
            return Steps(share.view(self.shape), self.grid)
        extent, middle = row_extent(x, self.rows)
        scale = row_scale(share, extent)
        if self.rows.symmetric:
            return Steps(scale, self.grid)
        zero_point = row_zero_point(scale, middle, self.rows)
        return Steps(scale, self.grid._replace(zero_point=zero_point))

    def kept(self, steps: Steps) -> tuple[Tensor | None, Tensor | None]:
        """Tensors of ``steps`` to save for the backward pass: those not equal to the parameter."""
        zero_point = steps.grid.zero_point
        if self.rows is None:
            return None, None
        return steps.scale, zero_point if isinstance(zero_point, Tensor) else None

    def kept_steps(self, kept: Sequence[Tensor | None], parameter: Tensor) -> Steps:
        """Inverse of ``kept``; ``parameter`` is the quantizer's scale, ``()`` or ``(size,)``."""
        scale, zero_point = kept
        if scale is None:
            return Steps(positive_scale(parameter).view(self.shape), self.grid)
        grid = self.grid if zero_point is None else self.grid._replace(zero_point=zero_point)
        return Steps(scale, grid)

    def gradient(self, grad: Tensor | None, parameter: Tensor, scale: Tensor) -> Tensor | None:
        """Gradient of the parameter from that of the broadcast scale.

        Args:
            grad: Gradient of ``Steps.scale``, same shape.
            parameter: Scale of the quantizer.
            scale: ``Steps.scale``.
        """
        if grad is None:
            return None
        if self.rows is not None:  # scale = parameter * extent of the vector
            share = positive_scale(parameter)
            return torch.sum(grad * scale).div_(share).mul_(self.factor).view(parameter.shape)
        return grad.mul(self.factor).view(parameter.shape)


class FakeQuantizer(QuantizerState):
    """Quantize and dequantize a tensor on a grid of ``2 ** num_bits`` values.

    It observes (``observer`` is set; returns its input), is off (``enabled`` is False;
    returns its input) or quantizes. Without calibration a weight quantizer returns its
    input, since weights are calibrated in stage 2; an activation quantizer raises.

    Args:
        spec: Bits, range type, granularity, observer.
        size: Entries of the granularity's axis; None for per-tensor.
        kind: ``activation`` or ``weight``.

    Attributes:
        scale: Step size, ``()`` or ``(size,)``; for ``PerRow`` the fraction of a vector's range
            that one step covers. A parameter if ``spec.learn_scale``.
        zero_point: Code of real zero, same shape, integers in float32; 0 for ``PerRow``, which
            computes a zero point per vector.
        row_axis: Axis of ``PerRow`` as int8, stored in checkpoints; else absent.
        levels: Table of a logarithmic code, int32, ``(2 ** num_bits,)``; else absent.
        quant_range: ``(qmin, qmax)`` as int32, stored in checkpoints.
        enabled: Whether to quantize.
        observer: Set while calibrating.
        name: Dotted path in the model, set by the conversion; used in errors.
        role: Role of the operand (``recipe.ROLES``), set by the conversion.

    Examples:
        >>> q = FakeQuantizer(QuantSpec(num_bits=4))
        >>> q.set_qparams(torch.tensor(0.5), torch.tensor(0.0))
        >>> q(torch.tensor([0.3, 100.0]))
        tensor([0.5000, 3.5000])
    """

    _offset: tuple[TensorState, float | None] | None = None

    @property
    def is_active(self) -> bool:
        """Whether a call quantizes in the current state."""
        return self.enabled and self.observer is None and self._is_calibrated

    @property
    def follows_rows(self) -> bool:
        """Whether each vector along an axis has its own scale (``PerRow``)."""
        return isinstance(self.spec.granularity, PerRow)

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point shaped to broadcast over ``x``, gradient scaled as in LSQ."""
        scale = positive_scale_ste(self.scale)
        if scale.requires_grad:
            factor = lsq_grad_factor(x.numel(), scale.numel(), self.spec.quant_range[1])
            scale = scale_gradient(scale, factor)
        if self.follows_rows:
            extent, middle = row_extent(x.float(), self.spec)
            scale = positive_scale_ste(scale * extent)
            return scale, row_zero_point(scale.detach(), middle, self.spec)
        if not isinstance(self.spec.granularity, PerChannel):
            return scale, self.zero_point
        shape = broadcast_shape(self.spec.granularity, x.dim())
        return scale.view(shape), self.zero_point.view(shape)

    def packed_form(self, shape: torch.Size) -> PackedForm:
        """How the quantizer packs a tensor of ``shape``."""
        granularity, qmax = self.spec.granularity, self.spec.quant_range[1]
        over = broadcast_shape(granularity, len(shape))
        factor = lsq_grad_factor(shape.numel(), self.scale.numel(), qmax)
        grid = Grid(*self.spec.quant_range, 0.0, levels=self.levels if self.spec.is_log else None)
        if self.follows_rows:
            return PackedForm(grid._replace(slack=ROW_SLACK), over, factor, self.spec)
        # read once: it synchronizes the device
        if self._offset is None or not self._offset[0].matches(self.zero_point):
            values, state = self.zero_point.unique(), TensorState(self.zero_point)
            self._offset = state, float(values) if len(values) == 1 else None
        offset = self._offset[1]
        zero_point = self.zero_point.view(over) if offset is None else offset
        return PackedForm(grid._replace(zero_point=zero_point), over, factor)

    @property
    def slack(self) -> float:
        """Steps by which a value in range may lie outside the codes, see ``Grid``."""
        return ROW_SLACK if self.follows_rows else 0.0

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Integer codes and their scale; the product is the quantized tensor.

        Args:
            x: Real values.

        Returns:
            ``(codes, scale)``: centred codes, or levels of a logarithmic code, have the shape
            of ``x`` in float32, the scale broadcasts to it. Both carry gradients.

        Raises:
            UncalibratedError: If the quantizer has no scale yet.
        """
        self._require_calibrated()
        x = x.float()
        scale, zero_point = self.qparams(x)
        if self.spec.is_log:
            return level_codes_ste(x, scale, self.levels), scale
        bounds = self.spec.quant_range
        return centered_codes_ste(x, scale, zero_point, *bounds, self.slack), scale

    def forward(self, x: Tensor) -> Tensor:
        """Values of ``x`` on the grid, in the shape and dtype of ``x``.

        Raises:
            UncalibratedError: If an activation quantizer has no scale yet.
            ValueError: If NaN or infinity is observed during calibration.
        """
        if self.observer is not None:
            self._observe(x)
            return x
        if not self.enabled or (self.kind == 'weight' and not self._is_calibrated):
            return x
        self._require_calibrated()
        if self.spec.is_log:
            codes, scale = self.codes(x)
            return (codes * scale).to(x.dtype)
        scale, zero_point = self.qparams(x)
        bounds = self.spec.quant_range
        return fake_quantize_ste(x.float(), scale, zero_point, *bounds, self.slack).to(x.dtype)

    def _require_calibrated(self) -> None:
        if not self._is_calibrated:
            raise UncalibratedError(
                f'{self.name or "this quantizer"} was never calibrated; load a checkpoint written '
                "by gplq_mm, or train with custom_hooks=[dict(type='gplq_mm.GPLQHook')]"
            )


def lsq_grad_factor(numel: int, num_scales: int, qmax: int) -> float:
    """LSQ's gradient scale, ``1 / sqrt(elements per scale * qmax)``.

    Args:
        numel: Number of quantized elements.
        num_scales: Number of scales that they share.
        qmax: Largest code.

    Examples:
        >>> lsq_grad_factor(700, 1, 7)
        0.014285714285714285
    """
    return 1.0 / (max(numel // max(num_scales, 1), 1) * max(qmax, 1)) ** 0.5


def broadcast_shape(granularity: Granularity, ndim: int) -> tuple[int, ...]:
    """Shape that a stored scale is viewed as, to broadcast over an ``ndim``-D tensor.

    Examples:
        >>> broadcast_shape(PerChannel(axis=1), 4), broadcast_shape(PerRow(), 4)
        ((1, -1, 1, 1), ())
    """
    if not isinstance(granularity, PerChannel):
        return ()
    shape = [1] * ndim
    shape[granularity.axis] = -1
    return tuple(shape)


def quantize_packed(x: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, list[Tensor]]:
    """Values of ``x`` on the grid, and their packed codes (``packing.codes``).

    Args:
        x: Real values in float32.
        scale: Positive step size, broadcastable to ``x``.
        grid: Allowed codes.

    Returns:
        ``(values, packed)``: values equal those of ``fake_quantize_ste`` bit for bit where
        ``x`` is finite and are NaN elsewhere, in the layout of ``x / scale``; packed is one
        int8 tensor of the same shape and layout, with a second, flat one of half the size
        for more than 4 bits.

    Examples:
        >>> grid = Grid(-8, 7, 0.0)
        >>> values, (packed,) = quantize_packed(torch.tensor([0.6, 9.0]), torch.tensor(0.5), grid)
        >>> values, (packed >> 4).tolist(), (packed & 15).tolist()  # residual 0.2: level 8 + 3
        (tensor([0.5000, 3.5000]), [1, 7], [11, 0])

    Raises:
        ValueError: For a logarithmic grid.
    """
    if grid.levels is not None:
        raise ValueError('logarithmic codes are recomputed, not packed')
    values, codes, field = passes_for(x, scale).pack(x, scale, grid)
    return values, [codes] if field is None else [codes, _in_pairs(field)]


def quantize_values(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Values of ``x``, same shape, bit for bit those of ``fake_quantize_ste``, without a graph."""
    return passes_for(x, scale).quantize(x, scale, grid)


def passes_for(*tensors: Tensor) -> Any:
    """Passes in C where they support these tensors (the scale last), else those in torch."""
    if cpu_kernels.load()[0] is None or tensors[0].device.type != 'cpu':
        return torch_passes
    return cpu_kernels.kernels_for(*tensors) or torch_passes


def _in_pairs(field: Tensor) -> Tensor:
    """Two fields per byte, in memory order."""
    flat = torch_passes.flat(field)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    pairs = flat.view(-1, 2)
    return pairs[:, 0] + pairs[:, 1] * 16
