# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Units: parts of a model that weight PTQ quantizes one after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..ops import QuantizedLayer
from .blocks import is_block
from .distributed import world
from .interception import intercepted, run_until_reached
from .passes import RunPass

MAX_LAYERS = 16
"""Most quantized layers of a unit that is not a transformer block."""


@dataclass
class _Trace:
    """Calls of one forward pass: layers in order, their parent modules, and numbers of calls."""

    around: dict[str, tuple[str, ...]] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)


@dataclass
class Unit:
    """A module that stage 2 runs alone and quantizes at once.

    Attributes:
        name: Its dotted name.
        module: Transformer block, or patch embedding, patch merging, FPN, RPN head, box or
            mask head, classifier head, single layer.
        layers: Its layers to quantize by full name, in execution order.
        calls: Number of calls of each layer per call of the unit.
        runs: Number of calls of the unit per forward pass of the model.
    """

    name: str
    module: nn.Module
    layers: dict[str, QuantizedLayer] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    runs: int = 1


@torch.no_grad()
def find_units(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], run_pass: RunPass
) -> list[Unit]:
    """Units of a model in execution order.

    The order is observed on the calibration images. A transformer block is a unit; any other
    layer belongs to the outermost parent module without a block and with at most
    ``MAX_LAYERS`` layers. All ranks find the same units.

    Args:
        model: Converted model in evaluation mode.
        layers: Layers to quantize.
        run_pass: Runs the model over this rank's images; the model is not run any more when
            every layer has run.

    Returns:
        The units; they do not contain layers that no image reaches.
    """
    traces: list[_Trace] = []
    seen: set[str] = set()

    def observe(run: Callable[[], Any]) -> None:
        trace = _Trace()
        if len(seen) < len(layers):
            with _traced(model, layers, trace):
                run_until_reached(run)
        seen.update(trace.around)
        traces.append(trace)

    with intercepted(model, observe):
        run_pass()
    return _group(model, layers, _merge(_of_all_ranks(traces)))


@contextmanager
def _traced(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], trace: _Trace
) -> Iterator[None]:
    """Context manager: records each layer's parent modules in ``trace``, in call order."""
    stack: list[str] = []
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            stack.append(name)
            trace.runs[name] = trace.runs.get(name, 0) + 1
            if name in layers:
                trace.around.setdefault(name, tuple(stack))

        return hook

    def leave(*_: Any) -> None:
        stack.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_all_ranks(traces: list[_Trace]) -> list[_Trace]:
    """Traces in image order: rank r holds images r, r + world, ..."""
    if world()[1] == 1:
        return traces
    shares: list[list[_Trace]] = [[] for _ in range(world()[1])]
    dist.all_gather_object(shares, traces)
    longest = max(map(len, shares))
    return [share[i] for i in range(longest) for share in shares if i < len(share)]


def _merge(traces: Sequence[_Trace]) -> _Trace:
    merged = _Trace()
    for trace in traces:
        for name, around in trace.around.items():
            merged.around.setdefault(name, around)
        for name, runs in trace.runs.items():
            merged.runs.setdefault(name, runs)
    return merged


def _group(model: nn.Module, layers: Mapping[str, QuantizedLayer], trace: _Trace) -> list[Unit]:
    units: dict[str, Unit] = {}
    modules = dict(model.named_modules())
    for name, around in trace.around.items():
        owner = _unit_name(modules, around, layers)
        unit = units.setdefault(owner, Unit(owner, modules[owner], runs=trace.runs[owner]))
        unit.layers[name] = layers[name]
        unit.calls[name] = max(trace.runs[name] // unit.runs, 1)
    return list(units.values())


def _unit_name(
    modules: Mapping[str, nn.Module], around: Sequence[str], layers: Mapping[str, QuantizedLayer]
) -> str:
    inner = [name for name in around if name]
    for name in inner:
        if is_block(modules[name]):
            return name
    for name in inner:
        inside = sum(other == name or other.startswith(name + '.') for other in layers)
        if inside <= MAX_LAYERS and not any(map(is_block, modules[name].modules())):
            return name
    return around[-1]
