# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""``gplq_mm.calibrate``: ranges of activations, and weights fitted to them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..analysis.start_error import float_state_of
from ..calibration.activation_ranges import calibrate_activations, calibrate_trained_weights
from ..calibration.layerwise import LayerwiseResult, calibrate_layerwise, layerwise_images
from ..recipe import CalibrationSettings
from ..stream.distributed import gather, world
from ..stream.evaluating import evaluating
from .gating import check_calibrated
from .inputs import (
    CalibrationBatches,
    ForwardLoop,
    Run,
    collect,
    images_of,
    loop_pass,
    recorded_calls,
)
from .model_state import CALIBRATED, CONVERTED, LOGGER, require_stage

RunPass = Callable[[], None]


@dataclass(frozen=True)
class CalibrationResult:
    """Result of a calibration.

    Attributes:
        quantizers: Number of quantizers calibrated.
        layers: Input scales and fitted weights by layer.
        gate: Feature error relative to the float model, and added bits, as in
            ``calibration.gate`` of a run's report; empty without a gate.
    """

    quantizers: int
    layers: LayerwiseResult
    gate: dict[str, Any] = field(default_factory=dict)


def calibrate(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    forward_loop: ForwardLoop | None = None,
) -> CalibrationResult:
    """Set the range of every activation, then input scales and weights layer by layer, in place.

    The recipe gives the number of images, the batch size (the loader's own is not used), and
    whether input scales are searched (``migrate``) and weights fitted (``compensate``). The
    images are held in memory, so every pass sees the same ones. With a process group each rank
    gets the same loader and takes its share of the batches.

    The recipe's gate then compares the model with the float one, on the images of the loader
    that follow (on the first calls of a loop), and stops before long work if calibration has
    broken the model. ``recipe='auto'`` gives the roles with the largest error more bits instead;
    the recipe of the model (``model.gplq.recipe``) then has rules that say so.

    Args:
        model: Model of ``gplq_mm.quantize``, not calibrated.
        loader: Yields tensors ``(B, ...)``; tuples or lists, of which the first element is
            used; or dicts of tensors, which become the model's keyword arguments.
        forward_loop: Instead of a loader: ``forward_loop(model)`` calls the model for all
            images, the same ones in every call; it must not use the model's output.

    Returns:
        Number of quantizers, the results by layer, and the figures of the gate.

    Raises:
        ValueError: If the model is not quantized or already calibrated, the loader is empty,
            too short for the recipe's number of images or yields something else, a tensor
            holds NaN or infinity, a quantizer is never reached, or the feature error is above the
            limit of the gate; the model then has its float weights and is not calibrated.

    Examples:
        >>> import gplq_mm, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        >>> coverage = gplq_mm.quantize(model, 'w4a4')
        >>> gplq_mm.calibrate(model, torch.randn(32, 5, 4).split(8)).quantizers
        2
    """
    state = require_stage(model, (CONVERTED,))
    settings: Any = state.recipe.calibration  # auto is replaced by numbers
    gate, number = state.recipe.gate, settings.num_images
    most = 0 if gate is None else gate.num_images
    float_state = {} if gate is None else float_state_of(model)
    every, some, others = passes(model, loader, forward_loop, settings, number, most)
    results: list[CalibrationResult] = []

    def run() -> None:
        results.append(_calibrate(model, settings, every, some))

    with recorded_calls(model, most if forward_loop is not None else 0) as calls:
        run()
    figures: dict[str, Any] = {}
    if gate is not None:
        batches: list[Run] = calls if others is None else others.runs()
        images = sum(gather(sum(map(images_of, calls)))) if others is None else len(others.images)
        figures = check_calibrated(model, float_state, batches, images, run)
    state.stage = CALIBRATED
    return replace(results[-1], gate=figures)


def _calibrate(model: nn.Module, settings: Any, every: RunPass, some: RunPass) -> CalibrationResult:
    """Ranges from one pass, scales and weights by layer from the other."""
    number, layers = calibrate_activations(model, every), LayerwiseResult()
    if settings.migrate or settings.compensate:
        with evaluating(model):
            layers = calibrate_layerwise(
                model,
                some,
                migrate=settings.migrate,
                compensate_weights=settings.compensate,
            )
    number += calibrate_trained_weights(model)
    for line in [f'calibrated {number} quantizers', *layers.summary()]:
        LOGGER.info(line)
    return CalibrationResult(number, layers)


def passes(
    model: nn.Module,
    loader: Iterable[Any] | None,
    forward_loop: ForwardLoop | None,
    settings: Any,
    num_images: int,
    others: int = 0,
) -> tuple[RunPass, RunPass, CalibrationBatches | None]:
    """Functions that run the model over all images, and over those of the layerwise calibration.

    Args:
        model: Quantized model.
        loader: See ``calibrate``.
        forward_loop: See ``calibrate``; used for both passes.
        settings: ``CalibrationSettings`` of the recipe, without ``auto``.
        num_images: Images to take from the loader.
        others: Images to take after them; the same ones if the loader has no others.

    Returns:
        Both functions, and the other images; None with a loop.

    Raises:
        ValueError: If neither or both of loader and loop are given, or the loader is not usable.
    """
    if (loader is None) == (forward_loop is None):
        raise ValueError('give images in one of two forms: loader, or forward_loop=...')
    if forward_loop is not None:
        run = loop_pass(model, forward_loop)
        return run, run, None
    assert loader is not None
    size = settings.batch_size
    found = collect(loader, num_images + others, size)
    images = found.first(num_images)
    _require_enough(images, num_images, settings)
    few = images.first(layerwise_images(size))
    return images.run_pass(model), few.run_pass(model), found.following(num_images, others)


def _require_enough(
    images: CalibrationBatches, requested: int, settings: CalibrationSettings
) -> None:
    found = len(images.images)
    if found < requested and not settings.all_if_fewer:
        raise ValueError(
            f'the recipe asks for {requested} calibration images, the loader gives {found}; give '
            f'more, or write recipe=dict(calibration=dict(num_images={found}))'
        )
    batches = -(-found // images.batch_size)
    if batches < world()[1]:
        raise ValueError(
            f'{batches} calibration batch(es) cannot be distributed over {world()[1]} ranks; '
            'give more images'
        )
    LOGGER.info('images: %d in batches of %d', found, images.batch_size)
