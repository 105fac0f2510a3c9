# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Stage 2: quantizes the weights, then fits the optional compensation."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..calibration.float_weights import copy_biases, copy_vectors, copy_weights
from ..convert import quantized_layers
from ..ops import QuantizedLayer
from ..quantizers import UncalibratedError
from ..recipe import RecipeLike, ptq_of
from ..stream.evaluating import evaluating
from ..stream.passes import Progress, RunPass
from .algorithms import build_weight_ptq
from .corrections.qwt import BlockResult, QwT
from .corrections.side_branch import attach_compensation, compensation_cost
from .stage2_recipe import resolve_compensation
from .task import PTQTask, WeightPTQ, write_nearest
from .weight_error import LayerResult, mean_weight_mse, measure_weight_error, summarize
from .weight_histogram import weight_histogram, worst_layers


@dataclass
class Stage2Result:
    """Result of stage 2.

    Attributes:
        layers: Weight error by layer.
        blocks: Compensation by block; empty without compensation.
        seconds: Wall time.
        side_params: Number of float32 parameters of the fitted branches.
        side_flops: Float operations of the branches per calibration image (mean;
            a multiply-accumulate counts 2).
        notes: Limitations that the algorithms report, one line each.
        histograms: ``weight_histogram`` of the layers with the largest relative error.
    """

    layers: dict[str, LayerResult]
    blocks: dict[str, BlockResult] = field(default_factory=dict)
    seconds: float = 0.0
    side_params: int = 0
    side_flops: int = 0
    notes: list[str] = field(default_factory=list)
    histograms: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def summary(self) -> dict[str, Any]:
        """``mean_sqnr_db``, and ``min_sqnr_db`` with its ``worst_layer``."""
        return summarize(self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON report."""
        return {
            'weights': {
                **self.summary,
                'mean_mse': mean_weight_mse(self.layers),
                'layers': {n: r.as_dict() for n, r in self.layers.items()},
                'histograms': self.histograms,
            },
            'compensation': {n: r.as_dict() for n, r in self.blocks.items()},
            'seconds': self.seconds,
            'side_params': self.side_params,
            'side_flops': self.side_flops,
            'notes': self.notes,
        }


def prepare_stage2(model: nn.Module, recipe: RecipeLike) -> list[str]:
    """Check the recipe's stage 2 and attach its modules; call it after the conversion.

    Args:
        model: Converted model, before a checkpoint is loaded.
        recipe: Its recipe.

    Returns:
        Names of the blocks that got an unfitted side branch; empty without
        compensation.

    Raises:
        ValueError: If the recipe names an unknown algorithm or option, or blocks
            that do not exist.
    """
    algorithms = build_weight_ptq(ptq_of(recipe))
    options = resolve_compensation(model, recipe)
    names = [] if options is None else attach_compensation(model, options['blocks'])
    for algorithm in algorithms:
        names += [n for n in algorithm.prepare(model) if n not in names]
    return names


@torch.no_grad()
def run_stage2(
    model: nn.Module,
    recipe: RecipeLike,
    run_pass: RunPass | None = None,
    progress: Progress | None = None,
    logger: logging.Logger | None = None,
    **task_options: Any,
) -> Stage2Result:
    """Quantize the weights of a stage-1 model, in place.

    Args:
        model: Converted model, activation quantizers calibrated, weights float.
        recipe: Its recipe.
        run_pass: Calls ``model`` once for each of this rank's calibration images; it
            must not use the results of the calls. Required by compensation and by
            algorithms with ``needs_data``.
        progress: Called as ``progress(name, index, total)`` before each step.
        logger: Gets one line per part.
        **task_options: ``seed``, ``folder``, ``data_key``, ``budget_bytes``, ``float_model`` and
            ``more_images`` of ``PTQTask``.

    Returns:
        Weight errors and costs.

    Raises:
        ValueError: If stage 2 already ran, a weight is NaN or infinite (checked before
            anything is written), data is required and missing, or the recipe names an
            unknown algorithm or option.
        UncalibratedError: If an input scale that folds into a weight is missing.
    """
    start = time.perf_counter()
    algorithms = build_weight_ptq(ptq_of(recipe))
    options = resolve_compensation(model, recipe)
    layers = quantized_layers(model)
    _check(layers, algorithms, options is not None, run_pass)
    weights, biases = copy_weights(layers), copy_biases(layers)
    trained = {n: la for n, la in layers.items() if la.weight_quantizer.is_calibrated}
    rest = {n: la for n, la in layers.items() if n not in trained}
    with evaluating(model):
        for name, layer in trained.items():
            write_nearest(layer, weights[name])
        norms = copy_vectors(model)
        task = PTQTask(model, rest, weights, run_pass, progress, biases, norms, **task_options)
        if rest:
            for algorithm in algorithms:
                algorithm.apply(task)
        else:
            task.notes.append('every weight was quantized in stage 1 and is rounded by its scale')
        factors = task.input_factors
        result = Stage2Result(
            {
                n: measure_weight_error(layer, weights[n], factors.get(n))
                for n, layer in layers.items()
            }
        )
        result.histograms = {
            n: weight_histogram(layers[n], weights[n]) for n in worst_layers(result.layers)
        }
        if options is not None and run_pass is not None:
            attach_compensation(model, options.pop('blocks'))
            qwt = QwT(model, rest, weights, biases=biases, norms=norms, **options)
            task.blocks.update(qwt.fit(run_pass, progress))
        result.blocks = dict(task.blocks)
        result.notes = task.notes
    result.side_params = compensation_cost(model)['side_params']
    result.side_flops = _side_flops(model, result.blocks)
    result.seconds = time.perf_counter() - start
    if logger is not None:
        _log(logger, result)
    return result


def _check(
    layers: Mapping[str, QuantizedLayer],
    algorithms: list[WeightPTQ],
    compensate: bool,
    run_pass: RunPass | None,
) -> None:
    if not layers:
        raise ValueError('stage 2: the model has no quantized layer; convert it first')
    if run_pass is None and (compensate or any(a.needs_data for a in algorithms)):
        raise ValueError('stage 2: this recipe needs calibration images; give run_pass')
    bad = [name for name, layer in layers.items() if not layer.weight.isfinite().all()]
    if bad:
        raise ValueError(
            f'{bad[0]}: the weight holds NaN or infinity ({len(bad)} such layer(s)); stage 1 '
            'diverged or its checkpoint is broken: lower its learning rate and train again'
        )
    for name, layer in layers.items():
        if layer.weight_quantizer.is_calibrated and not layer.weight_quantizer.spec.learn_scale:
            raise ValueError(
                f'{name}: the weights are already quantized; load the stage-1 checkpoint to run '
                'stage 2 again'
            )
        if layer.folds_input_scale and not layer.input_quantizer.is_calibrated:
            raise UncalibratedError(
                f'{name}: the per-channel input scale folds into the weight but was never '
                'calibrated; run stage 1, or at least its calibration, first'
            )


def _side_flops(model: nn.Module, blocks: Mapping[str, BlockResult]) -> int:
    widths = {n: len(model.get_submodule(n).compensation.bias) for n in blocks}  # type: ignore[union-attr, arg-type]
    fitted = {n: r for n, r in blocks.items() if r.fitted}
    return round(sum(2 * widths[n] ** 2 * r.tokens_per_image for n, r in fitted.items()))


def _log(logger: logging.Logger, result: Stage2Result) -> None:
    summary = result.summary
    logger.info(
        'stage 2: %d layers, weight SQNR mean %s dB, worst %s dB (%s), %.1f s',
        len(result.layers),
        summary['mean_sqnr_db'],
        summary['min_sqnr_db'],
        summary['worst_layer'],
        result.seconds,
    )
    for note in result.notes:
        logger.info('stage 2: %s', note)
    if result.blocks:
        logger.info(
            'compensation: %d of %d blocks, %d float parameters, %d float operations per image',
            sum(r.fitted for r in result.blocks.values()),
            len(result.blocks),
            result.side_params,
            result.side_flops,
        )
