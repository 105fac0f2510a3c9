# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""How a run calibrates, checks its start, trains, and ends."""

from dataclasses import dataclass
from typing import Literal

from .section import Section, setting


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationSettings(Section):
    """Calibration of the activations."""

    num_images: int | Literal['auto'] = setting('training images that set the ranges', minimum=1)
    seed: int = setting('seed of their draw', minimum=0)
    batch_size: int | Literal['auto'] = setting('images a forward pass', minimum=1)
    all_if_fewer: bool = setting(
        'True: take all images of a training set that has fewer; so with num_images: auto', False
    )
    migrate: bool = setting('search how far input scales follow the channels of each layer', False)
    compensate: bool = setting('fit float weights to the quantized inputs by least squares', False)


@dataclass(frozen=True, kw_only=True, eq=False)
class GateSettings(Section):
    """Check of the calibrated model before stage 1."""

    num_images: int = setting('training images that it looks at', 32, minimum=1)
    max_feature_error: float = setting('largest error of the feature that passes', 0.5, minimum=0)
    action: Literal['stop', 'warn', 'add_bits'] = setting(
        'what to do above it; add_bits gives the costliest roles 6, then 8 bits', 'stop'
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class OptimSettings(Section):
    """Training of stage 1; what the config's optim_wrapper gives wins."""

    lr: float | Literal['auto'] = setting('learning rate of the weights', minimum=0)
    lr_iterations: int | Literal['auto'] = setting(
        'a stage 1 with fewer steps takes smaller ones; 0 for never', 0, minimum=0
    )
    scale_lr: float | Literal['auto'] = setting('learning rate of the scales', minimum=0)
    vector_lr: float | Literal['auto'] | None = setting(
        'learning rate of biases, normalization and LayerScale in proportion to their size; '
        'null: they train as the weights do',
        None,
        minimum=0,
    )
    weight_decay: float = setting('decay of the weights', minimum=0)
    scale_weight_decay: float = setting('decay of the scales, for absolute steps', minimum=0)
    betas: tuple[float, float] | Literal['auto'] = setting("Adam's betas", minimum=0, below=1)
    train: Literal['all', 'attention', 'projection', 'vectors', 'none'] | tuple[str, ...] = setting(
        'weights that train (vectors: biases, normalization, LayerScale), or patterns of their '
        'names; scales always do',
        'all',
    )
    drop_rates: Literal['keep', 'off', 'auto'] = setting(
        "dropout and stochastic depth: the float model's, or none", 'keep'
    )
    scale_step: Literal['relative', 'absolute'] = setting(
        'steps of the scales in proportion to themselves, or by the optimizer', 'absolute'
    )

    def check(self, path: str) -> None:
        """Refuse a decay that relative steps would ignore."""
        if self.scale_step == 'relative' and self.scale_weight_decay:
            raise ValueError(
                f'{path}.scale_weight_decay={self.scale_weight_decay!r} has no effect on '
                "steps in proportion to the scales; write 0.0, or scale_step='absolute'"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class CompensationSettings(Section):
    """Linear side branches that stage 2 fits (QwT, arXiv 2411.13918)."""

    type: Literal['auto', 'qwt'] = setting('auto: only classifiers with transformer blocks', 'qwt')
    blocks: Literal['auto'] | tuple[str, ...] = setting('patterns of block names', 'auto')
    ridge: float = setting('penalty relative to the mean variance of the inputs', 1e-4, minimum=0)
    target: Literal['stage1', 'block'] = setting('output that a branch is fitted to', 'stage1')


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage2Settings(Section):
    """Stage 2 apart from the weight algorithm (weight.ptq)."""

    compensation: CompensationSettings | Literal['auto', 'qwt'] | None = setting(
        'side branches of the blocks: null, auto, qwt or a dict with options', None
    )
    num_images: int | None = setting(
        'training images of stage 2; null for those of the calibration', None, minimum=1
    )
