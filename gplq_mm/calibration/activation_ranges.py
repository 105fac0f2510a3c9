# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Ranges of activation quantizers from one or two passes over images."""

import torch
from torch import nn

from ..convert import quantized_layers, quantizers
from ..quantizers import FakeQuantizer, Observer, build_observer
from ..quantizers.observers import HistogramObserver
from ..stream.distributed import synchronize_observer
from ..stream.passes import RunPass

COUNTED = 512
"""Most values of a channel that a histogram counts per batch of images."""


def observe_activations(model: nn.Module, run_pass: RunPass) -> dict[str, Observer]:
    """Observe every activation operand of the float model.

    Quantizers return their input while they observe. It takes one pass, or two if an
    observer needs them.

    Args:
        model: Converted model, on its device.
        run_pass: Runs the model over the images; every call uses the same images.

    Returns:
        Observers by the quantizer's name, the same on all ranks.

    Raises:
        ValueError: If a tensor contains NaN or infinity, or if a quantizer was never
            reached (each is named).
    """
    found = quantizers(model, 'activation')
    try:
        for quantizer in found.values():
            quantizer.observer = build_observer(quantizer.spec)
            if isinstance(quantizer.observer, HistogramObserver):
                quantizer.observer.most_counted = COUNTED
        passes = max((q.observer.num_passes for q in found.values() if q.observer), default=0)
        for index in range(passes):
            _run_observed_pass(found, run_pass, index)
        _require_reached(found)
        return {n: q.observer for n, q in found.items() if q.observer}
    finally:
        for quantizer in found.values():
            quantizer.observer = None


def calibrate_activations(model: nn.Module, run_pass: RunPass) -> int:
    """Set scale and zero point of every activation quantizer, see ``observe_activations``.

    Args:
        model: Converted model, on its device.
        run_pass: Runs the model over the images; every call uses the same images.

    Returns:
        Number of quantizers calibrated.

    Raises:
        ValueError: If a tensor contains NaN or infinity, or if a quantizer was never
            reached (each is named).
    """
    observers = observe_activations(model, run_pass)
    for name, quantizer in quantizers(model, 'activation').items():
        set_observed(quantizer, observers[name])
    return len(observers)


def observed_passes(model: nn.Module) -> int:
    """Number of passes over the images in which ``calibrate_activations`` observes a model."""
    found = quantizers(model, 'activation').values()
    return max((build_observer(quantizer.spec).num_passes for quantizer in found), default=0)


def set_observed(quantizer: FakeQuantizer, observer: Observer) -> None:
    """Set scale, zero point and levels of a quantizer from its observer."""
    levels = observer.calculate_levels()
    if levels is not None:
        quantizer.set_levels(levels)
    quantizer.set_qparams(*observer.calculate_qparams())


@torch.no_grad()
def calibrate_trained_weights(model: nn.Module) -> int:
    """Set the scales of weight quantizers that train in stage 1 (``qat=True``).

    Args:
        model: Converted model whose activation quantizers are calibrated (a
            per-channel input scale is folded into the weight).

    Returns:
        Number of quantizers calibrated; 0 if weights stay float in stage 1.
    """
    count = 0
    for layer in quantized_layers(model).values():
        quantizer = layer.weight_quantizer
        if not quantizer.spec.learn_scale:
            continue
        observer = build_observer(quantizer.spec)
        for index in range(observer.num_passes):
            observer.pass_index = index
            observer.observe(layer.folded_weight())
        quantizer.set_qparams(*observer.calculate_qparams())
        count += 1
    return count


def is_calibrated(model: nn.Module) -> bool:
    """Whether every activation quantizer is calibrated."""
    return all(q.is_calibrated for q in quantizers(model, 'activation').values())


def _run_observed_pass(found: dict[str, FakeQuantizer], run_pass: RunPass, index: int) -> None:
    for quantizer in found.values():
        assert quantizer.observer is not None
        quantizer.observer.pass_index = index
    run_pass()
    for quantizer in found.values():
        assert quantizer.observer is not None
        if index < quantizer.observer.num_passes:
            synchronize_observer(quantizer)


def _require_reached(found: dict[str, FakeQuantizer]) -> None:
    missed = [n for n, q in found.items() if q.observer and q.observer.num_updates == 0]
    if missed:
        layer = missed[0].rpartition('.')[0]
        raise ValueError(
            f'{len(missed)} quantizer(s) were never reached by the calibration images: '
            f'{", ".join(missed[:5])}; exclude them with '
            f'rules=[dict(name={layer!r}, enabled=False)] or calibrate on more images'
        )
