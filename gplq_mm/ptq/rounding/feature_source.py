# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Features of a model by which its quantized state is compared with the stage-1 state."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...stream import Reached, Unit
from ...stream.calls import all_tensors
from ...stream.interception import run_until_reached

PROPOSALS = 100
"""Proposals per image at which RoI heads are compared."""
_ENTRIES = ('predict', 'forward')
"""Methods with which a detector passes its proposals to the RoI head."""


class FeatureSource:
    """Result of the forward pass: for models without a quantized head."""

    def features(self, run: Callable[[], Any], index: int) -> list[Tensor]:
        """Floating-point tensors in which two models are compared.

        Args:
            run: The model's forward with a batch. The first call for a batch has to be made
                with the stage-1 model.
            index: Number of the batch on this rank.
        """
        return floating(run())


class HeadFeatures(FeatureSource):
    """Input and output of a head; the forward pass stops after it."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def features(self, run: Callable[[], Any], index: int) -> list[Tensor]:
        """As in the base class."""
        return floating(self.calls_of_head(run))

    def calls_of_head(self, run: Callable[[], Any]) -> list[Any]:
        """Arguments and output of the head's call; none if the batch does not reach it."""
        with _calls_of([self.head], leave=True) as calls:
            run_until_reached(run)
        return calls


class RoIFeatures(HeadFeatures):
    """Inputs and outputs of the RPN and, at the stage-1 model's proposals, of the RoI heads.

    Proposals of two models differ, so features at each model's own proposals are not comparable.

    Args:
        model: Two-stage detector of mmdet, with an ``rpn_head`` and a ``roi_head``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model.rpn_head)
        self.roi_head = model.roi_head
        self.heads = [m for n, m in self.roi_head.named_modules() if _is_head(n)]
        self._proposals: dict[int, tuple[list[Any], Any]] = {}

    def features(self, run: Callable[[], Any], index: int) -> list[Tensor]:
        """As in the base class; the first call for a batch stores its proposals."""
        if index in self._proposals:
            first = self.calls_of_head(run)
        else:
            first = self._calls_up_to_proposals(run, index)
        if index not in self._proposals:
            return floating(first)
        ((maps, *_), _), *_ = first
        with _calls_of(self.heads) as second:
            self.roi_head.forward(maps, *self._proposals[index])
        return floating((first, second))

    def _calls_up_to_proposals(self, run: Callable[[], Any], index: int) -> list[Any]:
        """Calls of the RPN; runs until the proposals are passed on, and stores them."""

        def keep(_: Any, proposals: list[Any], samples: Any, **__: Any) -> None:
            self._proposals[index] = ([p[:PROPOSALS] for p in proposals], samples)
            raise Reached

        own = vars(self.roi_head)
        own.update(dict.fromkeys(_ENTRIES, keep))
        try:
            with _calls_of([self.head]) as calls:
                run_until_reached(run)
        finally:
            for name in _ENTRIES:
                del own[name]
        return calls


def feature_source(model: Any, units: Sequence[Unit]) -> tuple[FeatureSource, list[Unit]]:
    """Feature source of a model, and the units that the features depend on.

    Args:
        model: Converted model.
        units: Its units, see ``find_units``, in execution order.
    """
    owners = [unit.name.split('.')[0] for unit in units]
    if 'roi_head' in owners and hasattr(model, 'rpn_head'):
        return RoIFeatures(model), list(units)
    for index, owner in enumerate(owners):
        if owner.endswith('head'):
            return HeadFeatures(units[index].module), list(units[: index + 1])
    return FeatureSource(), list(units)


def floating(value: Any) -> list[Tensor]:
    """Non-empty floating-point tensors in nested tuples, lists and dicts."""
    return [t for t in all_tensors(value) if t.is_floating_point() and t.numel()]


def _is_head(name: str) -> bool:
    """Whether a module of an RoI head is a head: ``bbox_head``, ``mask_head.0``, ..."""
    first, _, rest = name.partition('.')
    return first.endswith('_head') and (not rest or rest.isdigit())


@contextmanager
def _calls_of(modules: Sequence[nn.Module], leave: bool = False) -> Iterator[list[Any]]:
    """Context manager: a list that collects arguments and output of every call of the modules.

    Args:
        modules: Modules to watch.
        leave: Raise ``Reached`` after the first call.
    """
    calls: list[Any] = []

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append((args, output))
        if leave:
            raise Reached

    handles = [m.register_forward_hook(hook) for m in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
