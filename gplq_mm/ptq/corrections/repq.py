# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Reparameterisation of LayerNorms: outputs with equal channel ranges before quantization.

Source: arXiv 2212.08254 (RepQ-ViT), section 4.1, equations 8 to 12, without the shift of
the zero point, which is wrong for zero padding of windows.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...ops import QuantizedLayer
from ...quantizers import FakeQuantizer, PerTensor, build_observer
from ...stream import CallStore, Unit, UnitStream, find_units
from ...stream.calls import all_tensors
from ...stream.distributed import all_reduce_max, synchronize_observer
from ...stream.exact_sum import ExactSum
from ...stream.unit_stream import run_unit
from ..algorithms import register_weight_ptq
from ..task import PREPARES, PTQTask, WeightPTQ


@dataclass
class Pair:
    """A LayerNorm and the linear layers whose input is its output."""

    norm: nn.LayerNorm
    consumers: dict[str, QuantizedLayer]


@register_weight_ptq('repq')
class RepQ(WeightPTQ):
    """Divide LayerNorm channels by their range and multiply the next weights by it.

    The float function does not change; the scale of the layers' input is calibrated again.
    The change is undone if it does not reduce the error of the layers' outputs due to
    quantized inputs, or if it changes the output of the unit (the LayerNorm has other
    consumers). Put it first: ``ptq=['repq', 'gptq']``.

    Args:
        strength: Exponent of the range, from 0 (nothing changes) to 1 (equal ranges).

    Raises:
        ValueError: If ``strength`` lies outside (0, 1].
    """

    needs_data: ClassVar[bool] = True
    phase: ClassVar[str] = PREPARES

    def __init__(self, strength: float = 1.0) -> None:
        if not 0 < strength <= 1:
            raise ValueError(f'repq strength={strength!r}: write a number in (0, 1], e.g. 1.0')
        self.strength = strength

    @torch.no_grad()
    def apply(self, task: PTQTask) -> None:
        """Unit by unit on the stage-1 model."""
        assert task.run_pass is not None
        units = find_units(task.model, task.layers, task.run_pass)
        stream = UnitStream(task.model, units, task.run_pass, None, task.budget_bytes, task.folder)
        for index, unit in enumerate(units):
            task.report(unit.name, index, len(units))
            inputs = stream.inputs(index)
            for pair in find_pairs(unit, inputs):
                self._reparameterize(task, unit, inputs, pair)

    def _reparameterize(self, task: PTQTask, unit: Unit, inputs: CallStore, pair: Pair) -> None:
        before = _input_error(unit, inputs, pair)
        quantizers = [la.input_quantizer for la in pair.consumers.values()]
        saved = [(q.scale.detach().clone(), q.zero_point.clone()) for q in quantizers]
        ranges = _channel_ranges(unit, inputs, pair)
        positive = torch.where(ranges > 0, ranges, 1.0)
        mean = positive.log().mean().exp()
        factor = torch.where(ranges > 0, (positive / mean) ** self.strength, 1.0)
        expected = _float_outputs(unit, inputs)
        _scale(task, pair, factor)
        if not _same(expected, _float_outputs(unit, inputs)):
            _scale(task, pair, 1 / factor)
            task.note(f'{unit.name}: a LayerNorm has consumers besides linear layers; not changed')
            return
        _calibrate(unit, inputs, quantizers)
        if not _input_error(unit, inputs, pair) < before:
            _scale(task, pair, 1 / factor)
            for quantizer, qparams in zip(quantizers, saved, strict=True):
                quantizer.set_qparams(*qparams)


def find_pairs(unit: Unit, inputs: CallStore) -> list[Pair]:
    """LayerNorms of a unit with the linear layers whose input is their output, channels last.

    The layers of a LayerNorm are those that run next with the same input; only layers with
    one input scale for all channels count. ``RepQ`` detects other consumers by comparing the
    unit's output.
    """
    pairs: list[Pair] = []
    last: list[Any] = [None, None]
    names = {id(la): name for name, la in unit.layers.items()}

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, nn.LayerNorm):
            last[:] = [Pair(module, {}), None]
            return
        pair, x = last
        if pair is None:
            return
        first = x is None
        if not _fits(module, pair.norm) or not (first or torch.equal(args[0], x)):
            last[0] = None
            return
        pair.consumers[names[id(module)]] = module
        if first:
            last[1] = args[0]
            pairs.append(pair)

    watched = [m for m in unit.module.modules() if isinstance(m, nn.LayerNorm)]
    handles = [m.register_forward_pre_hook(hook) for m in [*watched, *unit.layers.values()]]
    try:
        if len(inputs):
            run_unit(unit.module, inputs[0], _device(unit))
    finally:
        for handle in handles:
            handle.remove()
    norms = [id(p.norm) for p in pairs]
    return [p for p in pairs if norms.count(id(p.norm)) == 1]


def _fits(layer: nn.Module, norm: nn.LayerNorm) -> bool:
    return (
        isinstance(layer, QuantizedLayer)
        and layer.takes_tokens
        and isinstance(layer.input_quantizer.spec.granularity, PerTensor)
        and norm.elementwise_affine
        and tuple(norm.normalized_shape) == (layer.weight.shape[1],)
    )


def _device(unit: Unit) -> torch.device:
    return next(unit.module.parameters()).device


def _scale(task: PTQTask, pair: Pair, factor: Tensor) -> None:
    """Divide the LayerNorm's output by ``factor`` and multiply the next weights by it."""
    for parameter in pair.norm.parameters(recurse=False):
        parameter.div_(factor)
        task.float_norms[parameter].div_(factor)
    for name, layer in pair.consumers.items():
        layer.weight.mul_(factor)
        task.float_weights[name].mul_(factor)
        task.input_factors[name] = task.input_factors.get(name, 1.0) * factor


def _each_input(unit: Unit, inputs: CallStore, pair: Pair) -> Any:
    """Inputs of the pair's first layer, one per call."""
    layer = next(iter(pair.consumers.values()))
    caught: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        for call in inputs:
            run_unit(unit.module, call, _device(unit))
            yield from caught
            caught.clear()
    finally:
        handle.remove()


def _channel_ranges(unit: Unit, inputs: CallStore, pair: Pair) -> Tensor:
    """Largest magnitude of each channel, ``(channels,)``."""
    ranges = torch.zeros_like(pair.norm.weight)
    for x in _each_input(unit, inputs, pair):
        ranges = torch.maximum(ranges, x.abs().flatten(0, -2).amax(0))
    return all_reduce_max(ranges)


def _input_error(unit: Unit, inputs: CallStore, pair: Pair) -> float:
    """Squared output error of the layers due to the quantization of their input."""
    total = ExactSum((1,), pair.norm.weight.device)
    for x in _each_input(unit, inputs, pair):
        for layer in pair.consumers.values():
            y = layer.product(layer.input_quantizer(x) - x, layer.weight, None)
            total.add(y.double().square().sum()[None])
    total.reduce()
    return float(total.value())


def _calibrate(unit: Unit, inputs: CallStore, quantizers: list[FakeQuantizer]) -> None:
    """Calibrate quantizers with the recipe's observer."""
    for quantizer in quantizers:
        quantizer.observer = build_observer(quantizer.spec)
    passes = max(q.observer.num_passes for q in quantizers if q.observer)
    for index in range(passes):
        for quantizer in quantizers:
            assert quantizer.observer is not None
            quantizer.observer.pass_index = index
        for call in inputs:
            run_unit(unit.module, call, _device(unit))
        for quantizer in quantizers:
            assert quantizer.observer is not None
            if index < quantizer.observer.num_passes:
                synchronize_observer(quantizer)
    for quantizer in quantizers:
        assert quantizer.observer is not None
        qparams = quantizer.observer.calculate_qparams()
        quantizer.observer = None
        quantizer.set_qparams(*qparams)


def _float_outputs(unit: Unit, inputs: CallStore) -> list[Tensor]:
    """The unit's outputs for the first call, every quantizer off."""
    found = [m for m in unit.module.modules() if isinstance(m, FakeQuantizer)]
    enabled = [q.enabled for q in found]
    try:
        for quantizer in found:
            quantizer.enabled = False
        return all_tensors(run_unit(unit.module, inputs[0], _device(unit))) if len(inputs) else []
    finally:
        for quantizer, value in zip(found, enabled, strict=True):
            quantizer.enabled = value


def _same(expected: list[Tensor], found: list[Tensor]) -> bool:
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))
        for a, b in zip(expected, found, strict=True)
    )
