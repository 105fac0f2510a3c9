# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""``gplq_mm.calibrate``: ranges of activations, and weights fitted to them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..calibration.activation_ranges import calibrate_activations, calibrate_trained_weights
from ..calibration.layerwise import LayerwiseResult, calibrate_layerwise, layerwise_images
from ..recipe import CalibrationSettings
from ..stream.distributed import world
from ..stream.evaluating import evaluating
from .inputs import CalibrationBatches, ForwardLoop, collect, loop_pass
from .model_state import CALIBRATED, CONVERTED, LOGGER, require_stage

RunPass = Callable[[], None]


@dataclass(frozen=True)
class CalibrationResult:
    """Result of a calibration.

    Attributes:
        quantizers: Number of quantizers calibrated.
        layers: Input scales and fitted weights by layer.
    """

    quantizers: int
    layers: LayerwiseResult


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

    Args:
        model: Model of ``gplq_mm.quantize``, not calibrated.
        loader: Yields tensors ``(B, ...)``; tuples or lists, of which the first element is
            used; or dicts of tensors, which become the model's keyword arguments.
        forward_loop: Instead of a loader: ``forward_loop(model)`` calls the model for all
            images, the same ones in every call; it must not use the model's output.

    Returns:
        Number of quantizers, and the results by layer.

    Raises:
        ValueError: If the model is not quantized or already calibrated, the loader is empty,
            too short for the recipe's number of images or yields something else, a tensor
            holds NaN or infinity, or a quantizer is never reached.

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
    every, some = passes(model, loader, forward_loop, settings, settings.num_images)
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
    state.stage = CALIBRATED
    for line in [f'calibrated {number} quantizers', *layers.summary()]:
        LOGGER.info(line)
    return CalibrationResult(number, layers)


def passes(
    model: nn.Module,
    loader: Iterable[Any] | None,
    forward_loop: ForwardLoop | None,
    settings: Any,
    num_images: int,
) -> tuple[RunPass, RunPass]:
    """Functions that run the model over all images, and over those of the layerwise calibration.

    Args:
        model: Quantized model.
        loader: See ``calibrate``.
        forward_loop: See ``calibrate``; used for both passes.
        settings: ``CalibrationSettings`` of the recipe, without ``auto``.
        num_images: Images to take from the loader.

    Raises:
        ValueError: If neither or both of loader and loop are given, or the loader is not usable.
    """
    if (loader is None) == (forward_loop is None):
        raise ValueError('give images in one of two forms: loader, or forward_loop=...')
    if forward_loop is not None:
        run = loop_pass(model, forward_loop)
        return run, run
    assert loader is not None
    size = settings.batch_size
    images = collect(loader, num_images, size)
    _require_enough(images, num_images, settings)
    few = images.first(layerwise_images(size))
    return images.run_pass(model), few.run_pass(model)


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
