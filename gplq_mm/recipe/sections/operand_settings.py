# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""How activations and weights are quantized."""

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ...quantizers import OBSERVERS, Granularity, PerChannel, PerRow, PerTensor, QuantSpec
from ...quantizers.functional import MAX_BITS, MIN_BITS
from ...quantizers.log_codes import CODES
from ...quantizers.spec import AUTO_LOG_BITS
from .section import Section, setting

_Operand = TypeVar('_Operand', bound='OperandSettings')
OBSERVER_KEYS = ('observer', 'observer_args')


@dataclass(frozen=True, kw_only=True, eq=False)
class OperandSettings(Section):
    """Settings common to activations and weights."""

    enabled: bool = setting('False keeps these operands and their layers float', True)
    num_bits: int = setting('width of a code in bits', minimum=MIN_BITS, maximum=MAX_BITS)
    signed: bool = setting("two's complement codes (True) or codes from 0 on (False)", True)
    symmetric: bool = setting('zero point fixed at code 0 (True) or calibrated (False)', True)
    observer: str = setting(
        'algorithm that sets the range from calibration data', 'minmax', options=OBSERVERS
    )
    observer_args: dict[str, Any] = setting('keyword arguments of the observer', {})
    learn_scale: bool = setting('stage 1 trains the scale (LSQ)', False)

    @property
    def is_observed(self) -> bool:
        """Whether the observer affects the scale."""
        return True

    def with_rule(self: _Operand, given: dict[str, Any]) -> _Operand:
        """Settings overridden by one rule."""
        return self.overridden_by(given)


@dataclass(frozen=True, kw_only=True, eq=False)
class ActivationSettings(OperandSettings):
    """Inputs of layers and operands of attention products."""

    granularity: Literal['per_tensor', 'per_channel', 'per_row'] = setting(
        'which values share a scale; per_row, for attention: one scale per row'
    )
    codes: str = setting(
        'spacing of the codes; auto: log2 up to 4 bits, uniform above',
        'uniform',
        options=('uniform', 'auto', *CODES),
    )

    @property
    def is_observed(self) -> bool:
        """Whether the observer affects the scale: not with per-row scales or logarithmic codes."""
        is_auto_uniform = self.codes == 'auto' and self.num_bits > AUTO_LOG_BITS
        return (self.codes == 'uniform' or is_auto_uniform) and self.granularity != 'per_row'


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightSettings(OperandSettings):
    """Weights: quantized in stage 2, or trained on their grid in stage 1."""

    granularity: Literal['per_tensor', 'per_channel'] = setting(
        'which values share a scale; per_channel: one scale per output channel'
    )
    ptq: str | dict[str, Any] | tuple[str | dict[str, Any], ...] = setting(
        'algorithm of stage 2, or several in order; dict(type=NAME, ...) gives options; '
        'auto: gptq, with fine-tuning after it where a classifier is taken for pretrained',
        write="a name such as 'gptq', dict(type='gptq', ...), or a list of those",
    )
    qat: bool = setting('stage 1 trains weights on their grid; needs learn_scale', False)

    @property
    def is_observed(self) -> bool:
        """Whether the observer affects the scale: only if stage 1 trains it."""
        return self.qat

    def check(self, path: str) -> None:
        """Refuse settings that need trained grids; settings of rules are checked by layer."""
        if {'num_bits', 'ptq'} <= set(self.given or ()):
            self.check_trained(path)

    def check_trained(self, path: str) -> None:
        """Refuse ``qat`` without learned scales, and settings of learned scales without ``qat``.

        Args:
            path: Dotted name of the settings, or of the layer.

        Raises:
            ValueError: If ``qat``, ``learn_scale`` or the observer would have no effect.
        """
        if self.qat != self.learn_scale:
            raise ValueError(
                f'{path}: qat={self.qat} and learn_scale={self.learn_scale} have no effect without '
                'one another; write weight=dict(qat=True, learn_scale=True) to train weights on '
                'their grid, or neither'
            )
        if not self.qat and (self.observer != 'minmax' or self.observer_args):
            raise ValueError(
                f'{path}: observer={self.observer!r} with observer_args={self.observer_args} has '
                'no effect on weights that stage 2 quantizes, whose ranges are those of ptq; '
                "write weight=dict(ptq='mse'), or train weights on their grid with qat=True and "
                'learn_scale=True'
            )

    def with_rule(self: 'WeightSettings', given: dict[str, Any]) -> 'WeightSettings':
        """Settings overridden by one rule; ``qat=False`` also turns the learned scale off."""
        if given.get('qat') is False:
            given = {'learn_scale': False, **given}
        return self.overridden_by(given)


def spec_from_settings(
    settings: OperandSettings, axis: int | None, row_axis: int | None = None
) -> QuantSpec:
    """Quantizer spec of one operand.

    Args:
        settings: As given by ``RuleBook.resolve``.
        axis: Channel axis for ``per_channel``; None forces per-tensor.
        row_axis: Summed axis for ``per_row``; None if the operand has none.

    Raises:
        ValueError: For ``per_row`` without ``row_axis``, and for codes that do not fit the other
            settings.
    """
    return QuantSpec(
        num_bits=settings.num_bits,
        signed=settings.signed,
        symmetric=settings.symmetric,
        granularity=_granularity(settings, axis, row_axis),
        observer=settings.observer,
        learn_scale=settings.learn_scale,
        observer_args=dict(settings.observer_args),
        codes=settings.codes if isinstance(settings, ActivationSettings) else 'uniform',
    )


def _granularity(settings: Any, axis: int | None, row_axis: int | None) -> Granularity:
    if settings.granularity == 'per_row':
        if row_axis is None:
            raise ValueError(
                "granularity='per_row' is for the operands of attention (roles query, key, value, "
                "softmax); write 'per_channel' for the inputs of layers"
            )
        return PerRow(row_axis)
    return PerTensor() if settings.granularity == 'per_tensor' or axis is None else PerChannel(axis)
