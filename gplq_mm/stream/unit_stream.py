# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Calibration inputs of one unit after the other."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.torch import version_of
from .calls import Call, CallStore
from .interception import Reached, intercepted, run_until_reached
from .passes import RunPass
from .units import Unit


class UnitStream:
    """Computes the inputs of the units in order and stores those of one unit at a time.

    If the input of a unit is the unchanged output of the previous unit, only the previous unit
    runs, on its stored inputs. Otherwise (after a neck, after proposals) the images run through
    the model up to the unit; both give the same bits.

    Args:
        model: Converted model in evaluation mode.
        units: From ``find_units``.
        run_pass: Runs the model over this rank's images.
        context: Context manager for every run, for example one that restores the stage-1
            weights; None for none.
        budget_bytes: Bytes of inputs kept in memory; the rest is on disk.
        folder: Folder for the rest; the system's temporary folder if None.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        run_pass: RunPass,
        context: Callable[[], AbstractContextManager[Any]] | None = None,
        budget_bytes: int = 1 << 27,
        folder: str | None = None,
    ) -> None:
        self.model, self.units, self.run_pass = model, units, run_pass
        self.context = context or nullcontext
        self.budget_bytes, self.folder = budget_bytes, folder
        self._index = -1
        self._store: CallStore | None = None
        self._links: list[list[Call]] = []

    @torch.no_grad()
    def inputs(self, index: int) -> CallStore:
        """Calls of unit ``index`` with the current model.

        Call it for the units in order, after the previous unit has its final weights; units
        may be skipped.
        """
        with self.context():
            if self._store is not None and index == self._index + 1 and self._links:
                self._advance()
            elif index != self._index:
                self._capture(index)
        self._index = index
        assert self._store is not None
        return self._store

    def _new_store(self) -> CallStore:
        return CallStore(self.budget_bytes, self.folder)

    def _advance(self) -> None:
        """Run the current unit on its inputs; its outputs are the inputs of the next one."""
        assert self._store is not None
        module, links, store = self.units[self._index].module, self._links.pop(0), self._new_store()
        device = _device(module)
        for call, link in zip(self._store, links, strict=True):
            output = _first(run_unit(module, call, device))
            store.append(link.filled(_LINK, repeat(output).__next__))
        store.batches = [1] * len(store)
        self._store = store

    def _capture(self, index: int) -> None:
        """Run the images up to the unit, and on while each unit's input is the previous output."""
        self._store = store = self._new_store()
        chains: list[list[Call]] = []

        def record(run: Callable[[], Any]) -> None:
            recorder = _Recorder(self.units[index:], store)
            recorder.record(run)
            store.batches.append(recorder.calls)
            chains.append(recorder.links if recorder.calls == 1 else [])

        with intercepted(self.model, record):
            self.run_pass()
        length = min(map(len, chains), default=0)
        self._links = [[chain[i] for chain in chains] for i in range(length)]


class _Link:
    """Placeholder of the output of the previous unit."""


_LINK = _Link()


class _Recorder:
    """Stores the calls of the first unit in a forward pass, and links of the units after it."""

    def __init__(self, units: Sequence[Unit], store: CallStore) -> None:
        self.units, self.store = units, store
        self.calls = 0
        self.links: list[Call] = []
        self._output: tuple[Any, int] = (None, 0)

    def record(self, run: Callable[[], Any]) -> None:
        handles = []
        for position, unit in enumerate(self.units):
            handles += [
                unit.module.register_forward_pre_hook(self._enter(position), with_kwargs=True),
                unit.module.register_forward_hook(self._leave(position)),
            ]
        try:
            run_until_reached(run)
        finally:
            for handle in handles:
                handle.remove()
            self._output = (None, 0)

    def _enter(self, position: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if position == 0:
                self.calls += 1
                self.store.append(Call(args, dict(kwargs)))
                return
            if self.calls < self.units[0].runs:
                return  # units alternate: the first one still has to run again
            link = self._linked(Call(args, dict(kwargs)))
            once = self.calls == 1 and self.units[position].runs == 1
            if position != len(self.links) + 1 or not once or link is None:
                raise Reached
            self.links.append(link)

        return hook

    def _leave(self, position: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            first = _first(output)
            self._output = (first, version_of(first) if isinstance(first, Tensor) else 0)
            if position == len(self.units) - 1 and position == len(self.links) > 0:
                raise Reached

        return hook

    def _linked(self, call: Call) -> Call | None:
        """The call with the last output replaced by a mark; None if it has other tensors."""
        output, version = self._output
        tensors = call.tensors
        if not tensors or any(t is not output or version_of(t) != version for t in tensors):
            return None
        return call.map(lambda _: _LINK)


def run_unit(module: nn.Module, call: Call, device: torch.device) -> Any:
    """Output of a unit for one stored call."""
    moved = call.map(lambda t: t.to(device))
    return module(*moved.args, **moved.kwargs)


def layer_inputs(unit: Unit, names: Sequence[str], call: Call) -> dict[str, list[Tensor]]:
    """Inputs of layers in one call of their unit, one tensor per call of the layer.

    The unit runs until all layers are reached.
    """
    caught: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            caught[name].append(args[0])
            if all(len(caught[n]) >= unit.calls[n] for n in names):
                raise Reached

        return hook

    handles = [unit.layers[n].register_forward_pre_hook(hook_of(n)) for n in names]
    try:
        run_until_reached(lambda: run_unit(unit.module, call, _device(unit.module)))
    finally:
        for handle in handles:
            handle.remove()
    return caught


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _first(output: Any) -> Any:
    """The tensor that a unit passes on: its output, or the first of several."""
    return output[0] if isinstance(output, tuple | list) and output else output
