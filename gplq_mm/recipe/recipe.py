# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Recipe: the full description of a quantization."""

from collections.abc import Sequence
from dataclasses import dataclass

from .sections.mimic import MimicTerm
from .sections.operand_settings import ActivationSettings, WeightSettings
from .sections.rule import Rule
from .sections.run_settings import CalibrationSettings, GateSettings, OptimSettings, Stage2Settings
from .sections.section import Section, setting

SCOPES = {
    'backbone': ('backbone',),
    'backbone+neck': ('backbone', 'neck'),
    'all': ('',),
    'auto': ('',),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Recipe(Section):
    """A validated recipe. ``as_dict`` gives the form of configs, checkpoints and reports.

    Examples:
        >>> from gplq_mm.recipe import as_recipe
        >>> as_recipe('w4a4').activation.num_bits
        4
    """

    name: str = setting('name of the recipe, in reports')
    scope: str | tuple[str, ...] = setting(
        'what is quantized; auto: backbone of a detector, all of a classifier; or module names',
        options=SCOPES,
    )
    activation: ActivationSettings = setting('inputs of layers and operands of attention')
    weight: WeightSettings = setting('weights')
    rules: tuple[Rule, ...] = setting(
        'other settings by layer or role; rules of a config are appended',
        write="a list of dict(name='*.attn.*', ...) or dict(role='softmax', ...)",
    )
    calibration: CalibrationSettings = setting('calibration of the activations')
    mimic: MimicTerm | tuple[MimicTerm, ...] | None = setting(
        'mimicking of the float model in stage 1: a term, a list of terms, or null',
        write="dict(type='pca'), a list of such dicts, or None",
    )
    optim: OptimSettings = setting('training of stage 1')
    stage2: Stage2Settings | None = setting('stage 2 apart from weight.ptq')
    gate: GateSettings | None = setting(
        'check of the calibrated model before stage 1; null for none', None
    )

    @property
    def after_training(self) -> Stage2Settings:
        """Settings of stage 2, the defaults if the recipe has none."""
        return self.stage2 or Stage2Settings()

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Name prefixes of the scope."""
        return scope_prefixes(self.scope)


def scope_prefixes(scope: str | Sequence[str]) -> tuple[str, ...]:
    """Name prefixes of a scope.

    Examples:
        >>> scope_prefixes('backbone+neck'), scope_prefixes(['backbone', 'neck.convs'])
        (('backbone', 'neck'), ('backbone', 'neck.convs'))
    """
    return SCOPES[scope] if isinstance(scope, str) else tuple(scope)
