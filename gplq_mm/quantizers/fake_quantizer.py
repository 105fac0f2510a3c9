# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""FakeQuantizer: the module that holds a scale and simulates integer codes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.torch import LoadsState, version_of
from .grid import Grid, Operand, row_grid
from .learned_scale import (
    centered_codes_ste,
    fake_quantize_ste,
    level_codes_ste,
    lsq_grad_factor,
    positive_scale_ste,
    scale_gradient,
)
from .log_codes import default_levels
from .observers import Observer
from .row_range import ROW_SLACK, row_extent, row_zero_point
from .spec import PerChannel, PerRow, QuantizerKind, QuantSpec, broadcast_shape
from .stored_form import require_same_form, stored_spec


class UncalibratedError(RuntimeError):
    """A quantizer was asked to quantize before it had a scale."""


class FakeQuantizer(LoadsState):
    """Quantize and dequantize a tensor on a grid of ``2 ** num_bits`` values a scale.

    It is in one of three conditions: observing (``observer`` is set; passes its
    input through), off (``enabled`` is False; passes its input through) or
    quantizing. A weight quantizer passes its input through until it is
    calibrated, which happens in stage 2; an activation quantizer then raises.

    Args:
        spec: Bits, range type, granularity, observer.
        size: Entries of the granularity's axis; None for per-tensor.
        kind: ``activation`` or ``weight``.

    Attributes:
        scale: Step size, ``()`` or ``(size,)``; for ``PerRow`` the share of a vector's range
            that a step covers. A parameter if ``spec.learn_scale``.
        zero_point: Code of real zero, same shape, float32 holding integers; 0 for ``PerRow``,
            whose zero points follow the vectors.
        row_axis: Axis of ``PerRow`` as int8, so that a checkpoint states it; else absent.
        levels: Table of a logarithmic code, int32, ``(2 ** num_bits,)``; else absent.
        quant_range: ``(qmin, qmax)`` as int32, so that a checkpoint states its bits.
        enabled: Whether to quantize.
        observer: Set while calibrating.
        name: Dotted path in the model, set by the conversion; used in errors.
        role: What it quantizes (``recipe.ROLES``), set by the conversion.

    Examples:
        >>> q = FakeQuantizer(QuantSpec(num_bits=4))
        >>> q.set_qparams(torch.tensor(0.5), torch.tensor(0.0))
        >>> q(torch.tensor([0.3, 100.0]))
        tensor([0.5000, 3.5000])
    """

    scale: Tensor
    zero_point: Tensor
    quant_range: Tensor
    calibrated: Tensor
    levels: Tensor
    row_axis: Tensor

    def __init__(
        self, spec: QuantSpec, size: int | None = None, kind: QuantizerKind = 'activation'
    ) -> None:
        super().__init__()
        self.spec = spec
        self.kind = kind
        self.name = ''
        self.role = ''
        self.enabled = True
        self.observer: Observer | None = None
        shape = spec.granularity.scale_shape(size)
        if spec.learn_scale:
            self.scale = nn.Parameter(torch.ones(shape))
        else:
            self.register_buffer('scale', torch.ones(shape))
        self.register_buffer('zero_point', torch.zeros(shape))
        self.register_buffer('quant_range', torch.tensor(spec.quant_range, dtype=torch.int32))
        self.register_buffer('calibrated', torch.tensor(False))
        self._register_row_axis()
        self._register_levels()
        self._is_calibrated = False
        self._offset: tuple[tuple[int, int], float | None] | None = None

    @property
    def is_calibrated(self) -> bool:
        """Whether the scale was found (kept beside the buffer to spare a device sync)."""
        return self._is_calibrated

    @property
    def is_active(self) -> bool:
        """Whether a call quantizes now."""
        return self.enabled and self.observer is None and self._is_calibrated

    @torch.no_grad()
    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Store a scale and zero point and mark the quantizer calibrated.

        Args:
            scale: Positive, ``()``, ``(1,)`` or ``(size,)``.
            zero_point: Integer values, same shape.

        Raises:
            ValueError: If a value is not finite or a scale is not positive.
        """
        if not (torch.isfinite(scale).all() and torch.isfinite(zero_point).all()):
            raise ValueError(f'{self.name or "quantizer"}: scale or zero point is NaN or infinite')
        if (scale <= 0).any():
            raise ValueError(
                f'{self.name or "quantizer"}: scale must be positive, got {scale.min()}'
            )
        self.scale.copy_(scale.reshape(self.scale.shape))
        self.zero_point.copy_(zero_point.reshape(self.scale.shape))
        self._set_calibrated(True)

    @torch.no_grad()
    def set_levels(self, levels: Tensor) -> None:
        """Store the table of a logarithmic code.

        Args:
            levels: Integers, ``(2 ** num_bits,)``.
        """
        self.levels.copy_(levels)

    def _register_row_axis(self) -> None:
        """The axis of ``PerRow``, or none."""
        if isinstance(self.spec.granularity, PerRow):
            axis = torch.tensor(self.spec.granularity.axis, dtype=torch.int8)
            self.register_buffer('row_axis', axis.to(self.zero_point.device))
        else:
            self._drop_buffer('row_axis')

    def _drop_buffer(self, name: str) -> None:
        if hasattr(self, name):
            delattr(self, name)

    def _register_levels(self) -> None:
        """The table of a logarithmic code, or none."""
        if self.spec.log_code is not None:
            levels = default_levels(self.spec.log_code, self.spec.num_bits)
            self.register_buffer('levels', levels.to(self.zero_point.device))
        else:
            self._drop_buffer('levels')

    @torch.no_grad()
    def set_spec(self, spec: QuantSpec) -> None:
        """Change bits, symmetry or codes; the stored scale keeps its shape and value.

        Args:
            spec: Of the same granularity.
        """
        assert spec.granularity == self.spec.granularity
        has_same_codes = (spec.log_code, spec.num_bits) == (self.spec.log_code, self.spec.num_bits)
        self.spec = spec
        self.quant_range.copy_(torch.tensor(spec.quant_range, dtype=torch.int32))
        if not has_same_codes:
            self._register_levels()

    def take_form_of(self, state: Mapping[str, Any], prefix: str = '') -> None:
        """Become the static, uniform quantizer that a stored state is of, if it is of one.

        Checkpoints of the presets before ``PerRow`` hold one scale a tensor or a head where a
        present recipe has one a channel or a vector. Their values are not loaded here, the
        quantizer is uncalibrated after a change. Scale and zero point stay the same objects, so
        that whatever holds them (an optimizer, DDP) stays right.

        Args:
            state: State dict.
            prefix: Of the quantizer's keys in it, ``backbone.fc.input_quantizer.``.
        """
        axis = -3 if self.role == 'image' else None  # of ``(B, C, H, W)``
        spec = stored_spec(self.spec, state, prefix, axis)
        if self.kind == 'weight' or spec == self.spec:
            return
        shape = state[prefix + 'scale'].shape
        self.spec = spec
        with torch.no_grad():
            self.scale.set_(self.scale.new_ones(shape))  # type: ignore[call-overload]
            self.zero_point.set_(self.zero_point.new_zeros(shape))  # type: ignore[call-overload]
        self.scale.grad = None
        self._register_row_axis()
        self._register_levels()
        self.reset()

    def reset(self) -> None:
        """Forget the calibration (the scale's value stays)."""
        self._set_calibrated(False)

    def _set_calibrated(self, value: bool) -> None:
        self.calibrated.fill_(value)
        self._is_calibrated = value

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

    def operand(self, shape: torch.Size) -> Operand:
        """How the quantizer applies to a tensor of ``shape``, for packed codes."""
        granularity, qmax = self.spec.granularity, self.spec.quant_range[1]
        over = broadcast_shape(granularity, len(shape))
        factor = lsq_grad_factor(shape.numel(), self.scale.numel(), qmax)
        grid = Grid(*self.spec.quant_range, 0.0, levels=self.levels if self.spec.is_log else None)
        if self.follows_rows:
            return Operand(row_grid(grid), over, factor, self.spec)
        key = (self.zero_point.data_ptr(), version_of(self.zero_point))
        if self._offset is None or self._offset[0] != key:  # read once: it costs a device sync
            values = self.zero_point.unique()
            self._offset = key, float(values) if len(values) == 1 else None
        offset = self._offset[1]
        zero_point = self.zero_point.view(over) if offset is None else offset
        return Operand(grid._replace(zero_point=zero_point), over, factor)

    @property
    def slack(self) -> float:
        """Steps by which a value in range may lie outside the codes, see ``Grid``."""
        return ROW_SLACK if self.follows_rows else 0.0

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Integer codes and the scale that turns them into values.

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
        """Values of ``x`` on the grid, in the dtype of ``x``.

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

    def _observe(self, x: Tensor) -> None:
        assert self.observer is not None
        try:
            self.observer.observe(x)
        except ValueError as error:
            raise ValueError(
                f'{self.name or "quantizer"}: {error}; check the FP32 checkpoint and the '
                'calibration images'
            ) from error

    def _require_calibrated(self) -> None:
        if not self._is_calibrated:
            raise UncalibratedError(
                f'{self.name or "this quantizer"} was never calibrated; load a checkpoint written '
                "by gplq_mm, or train with custom_hooks=[dict(type='gplq_mm.GPLQHook')]"
            )

    def before_load(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Refuse codes of another range; take the form that the stored state has.

        Raises:
            ValueError: The state was quantized to other codes, or is of another form.
        """
        loaded = state_dict.get(prefix + 'quant_range')
        if self.kind == 'weight' and not bool(state_dict.get(prefix + 'calibrated', True)):
            # a weight that is still float has no codes: stage 2 may give it other bits
            state_dict[prefix + 'quant_range'] = self.quant_range
        elif loaded is not None and loaded.tolist() != self.quant_range.tolist():
            raise ValueError(
                f'{prefix}quant_range: the checkpoint was quantized to the codes '
                f'{loaded.tolist()}, this config asks for {self.quant_range.tolist()}; use the '
                'recipe that the checkpoint was made with'
            )
        if self.kind == 'activation':
            self.take_form_of(state_dict, prefix)
            require_same_form(self.state_dict(), state_dict, prefix)

    def after_load(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Know without a device sync whether the quantizer is calibrated."""
        if prefix + 'calibrated' in state_dict:
            self._is_calibrated = bool(self.calibrated)

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        spec = self.spec
        sign = 'signed' if spec.signed else 'unsigned'
        kind = 'symmetric' if spec.symmetric else 'asymmetric'
        codes = '' if spec.codes == 'uniform' else f', {spec.codes}'
        return f'{self.kind}, bits={spec.num_bits}, {sign}, {kind}, {spec.granularity}{codes}'
