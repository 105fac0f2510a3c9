# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Settings of calibration, gate, stage 1 and stage 2."""

from dataclasses import dataclass
from typing import Literal

from .section import Section, setting


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationSettings(Section):
    """Calibration of the activations."""

    num_images: int | Literal['auto'] = setting('training images that set the ranges', minimum=1)
    seed: int = setting('seed of their random choice', minimum=0)
    batch_size: int | Literal['auto'] = setting('images per forward pass', minimum=1)
    all_if_fewer: bool = setting(
        'True: take all images if the training set has fewer; so with num_images: auto', False
    )
    migrate: bool = setting(
        'search how closely the input scales of each layer follow its channels', False
    )
    compensate: bool = setting('fit float weights to the quantized inputs by least squares', False)


@dataclass(frozen=True, kw_only=True, eq=False)
class GateSettings(Section):
    """Check of the calibrated model before stage 1."""

    num_images: int = setting('training images compared', 32, minimum=1)
    max_feature_error: float = setting('largest feature error that passes', 0.5, minimum=0)
    action: Literal['stop', 'warn', 'add_bits'] = setting(
        'action above it; add_bits gives the roles with the largest error 6, then 8 bits', 'stop'
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class OptimSettings(Section):
    """Training of stage 1; keys of the config's optim_wrapper take precedence."""

    lr: float | Literal['auto'] = setting('learning rate of the weights', minimum=0)
    lr_iterations: int | Literal['auto'] = setting(
        'a stage 1 with fewer steps lowers the learning rate; 0 for never', 0, minimum=0
    )
    scale_lr: float | Literal['auto'] = setting('learning rate of the scales', minimum=0)
    vector_lr: float | Literal['auto'] | None = setting(
        'learning rate of biases, normalization and LayerScale relative to their size; '
        'null: they train like the weights',
        None,
        minimum=0,
    )
    weight_decay: float = setting('weight decay of the weights', minimum=0)
    scale_weight_decay: float = setting('weight decay of the scales, for absolute steps', minimum=0)
    betas: tuple[float, float] | Literal['auto'] = setting("Adam's betas", minimum=0, below=1)
    train: Literal['all', 'attention', 'projection', 'vectors', 'none'] | tuple[str, ...] = setting(
        'weights that train (vectors: biases, normalization, LayerScale), or patterns of their '
        'names; scales always train',
        'all',
    )
    drop_rates: Literal['keep', 'off', 'auto'] = setting(
        "dropout and stochastic depth: the float model's rates, or none", 'keep'
    )
    scale_step: Literal['relative', 'absolute'] = setting(
        'steps of the scales relative to their size, or absolute as the optimizer takes them',
        'absolute',
    )

    def check(self, path: str) -> None:
        """Refuse a weight decay that relative steps would ignore.

        Raises:
            ValueError: Names the two keys.
        """
        if self.scale_step == 'relative' and self.scale_weight_decay:
            raise ValueError(
                f'{path}.scale_weight_decay={self.scale_weight_decay!r} has no effect on '
                "steps relative to the scales; write 0.0, or scale_step='absolute'"
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
        'side branches of the blocks (QwT): null, auto, qwt or a dict with options', None
    )
    num_images: int | None = setting(
        'training images of stage 2; null for those of the calibration', None, minimum=1
    )
