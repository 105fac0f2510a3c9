# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""State of a quantizer: its buffers, and how they are calibrated, loaded and changed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.torch import LoadsState
from .log_codes import default_levels
from .observers import Observer
from .spec import PerRow, QuantizerKind, QuantSpec
from .stored_form import require_same_form, stored_spec


class UncalibratedError(RuntimeError):
    """A quantizer was called before it had a scale."""


class QuantizerState(LoadsState):
    """Base class of ``FakeQuantizer`` with its state; see there for the attributes.

    Args:
        spec: Bits, range type, granularity, observer.
        size: Entries of the granularity's axis; None for per-tensor.
        kind: ``activation`` or ``weight``.
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

    @property
    def is_calibrated(self) -> bool:
        """Whether a scale is set (stored outside the buffer to avoid a device synchronization)."""
        return self._is_calibrated

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
        """Register ``row_axis`` for ``PerRow``, else remove it."""
        if isinstance(self.spec.granularity, PerRow):
            axis = torch.tensor(self.spec.granularity.axis, dtype=torch.int8)
            self.register_buffer('row_axis', axis.to(self.zero_point.device))
        else:
            self._drop_buffer('row_axis')

    def _drop_buffer(self, name: str) -> None:
        if hasattr(self, name):
            delattr(self, name)

    def _register_levels(self) -> None:
        """Register ``levels`` for a logarithmic code, else remove it."""
        if self.spec.log_code is not None:
            levels = default_levels(self.spec.log_code, self.spec.num_bits)
            self.register_buffer('levels', levels.to(self.zero_point.device))
        else:
            self._drop_buffer('levels')

    @torch.no_grad()
    def set_spec(self, spec: QuantSpec) -> None:
        """Change bits, symmetry or codes; the stored scale keeps its shape and value.

        Args:
            spec: New spec, with the same granularity.
        """
        assert spec.granularity == self.spec.granularity
        has_same_codes = (spec.log_code, spec.num_bits) == (self.spec.log_code, self.spec.num_bits)
        self.spec = spec
        self.quant_range.copy_(torch.tensor(spec.quant_range, dtype=torch.int32))
        if not has_same_codes:
            self._register_levels()

    def take_form_of(self, state: Mapping[str, Any], prefix: str = '') -> None:
        """Take the granularity and codes of a stored state that is static and uniform.

        Checkpoints of the presets before ``PerRow`` have one scale per tensor or head where
        current recipes have one per channel or vector. Values are not loaded here; the
        quantizer is uncalibrated after a change. Scale and zero point stay the same objects, so
        that references to them (an optimizer, DDP) stay valid.

        Args:
            state: State dict.
            prefix: Prefix of the quantizer's keys, ``backbone.fc.input_quantizer.``.
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
        """Mark the quantizer uncalibrated; the scale keeps its value."""
        self._set_calibrated(False)

    def _set_calibrated(self, value: bool) -> None:
        self.calibrated.fill_(value)
        self._is_calibrated = value

    def _observe(self, x: Tensor) -> None:
        assert self.observer is not None
        try:
            self.observer.observe(x)
        except ValueError as error:
            raise ValueError(
                f'{self.name or "quantizer"}: {error}; check the FP32 checkpoint and the '
                'calibration images'
            ) from error

    def before_load(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Refuse codes of another range; take granularity and codes of an older state.

        Raises:
            ValueError: If the state has another range, granularity or kind of codes.
        """
        loaded = state_dict.get(prefix + 'quant_range')
        if self.kind == 'weight' and not bool(state_dict.get(prefix + 'calibrated', True)):
            # an uncalibrated weight has no codes yet: stage 2 may use other bits
            state_dict[prefix + 'quant_range'] = self.quant_range
        elif loaded is not None and loaded.tolist() != self.quant_range.tolist():
            raise ValueError(
                f'{prefix}quant_range: the checkpoint was quantized to the codes '
                f'{loaded.tolist()}, this config has {self.quant_range.tolist()}; use the '
                'recipe that the checkpoint was made with'
            )
        if self.kind == 'activation':
            self.take_form_of(state_dict, prefix)
            require_same_form(self.state_dict(), state_dict, prefix)

    def after_load(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Store whether the quantizer is calibrated, to avoid later device synchronizations."""
        if prefix + 'calibrated' in state_dict:
            self._is_calibrated = bool(self.calibrated)

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        spec = self.spec
        sign = 'signed' if spec.signed else 'unsigned'
        kind = 'symmetric' if spec.symmetric else 'asymmetric'
        codes = '' if spec.codes == 'uniform' else f', {spec.codes}'
        return f'{self.kind}, bits={spec.num_bits}, {sign}, {kind}, {spec.granularity}{codes}'
