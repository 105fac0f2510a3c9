# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Which features of a model tell what its quantization changed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...stream import Reached, Unit
from ...stream.calls import all_tensors
from ...stream.interception import run_until_reached

PROPOSALS = 100
"""Proposals an image at which RoI heads are compared."""
_ENTRIES = ('predict', 'forward')
"""Methods by which a detector hands its proposals to the RoI head."""


class FeatureSource:
    """What the pass over the images gives: for models of which no head is quantized."""

    def features(self, run: Callable[[], Any], index: int) -> list[Tensor]:
        """Floating-point tensors that two models can be compared by.

        Args:
            run: The model's forward with a batch. The first call for a batch is made with the
                stage-1 model.
            index: Number of the batch on this rank.
        """
        return floating(run())


class HeadFeatures(FeatureSource):
    """What a head gets and gives; nothing behind it runs."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def features(self, run: Callable[[], Any], index: int) -> list[Tensor]:
        """As in the base class."""
        return floating(self.calls_of_head(run))

    def calls_of_head(self, run: Callable[[], Any]) -> list[Any]:
        """Arguments and output of the head's call; none where the batch does not reach it."""
        with _calls_of([self.head], leave=True) as calls:
            run_until_reached(run)
        return calls


class RoIFeatures(HeadFeatures):
    """What the RPN and, at the stage-1 model's proposals, the RoI heads get and give.

    Proposals of two models differ, so that features at each one's own could not be compared.

    Args:
        model: Two-stage detector of mmdet, with an ``rpn_head`` and a ``roi_head``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model.rpn_head)
        self.roi_head = model.roi_head
        self.heads = [m for n, m in self.roi_head.named_modules() if _is_head(n)]
        self._proposals: dict[int, tuple[list[Any], Any]] = {}

    def features(self, run: Callable[[], Any], index: int) -> list[Tensor]:
        """As in the base class; the first call for a batch keeps its proposals."""
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
        """Calls of the RPN; runs on until the proposals are handed over, and keeps those."""

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
    """The features for a model, and the units that they depend on.

    Args:
        model: Converted model.
        units: Its units, see ``find_units``, in the order in which they run.
    """
    owners = [unit.name.split('.')[0] for unit in units]
    if 'roi_head' in owners and hasattr(model, 'rpn_head'):
        return RoIFeatures(model), list(units)
    for index, owner in enumerate(owners):
        if owner.endswith('head'):
            return HeadFeatures(units[index].module), list(units[: index + 1])
    return FeatureSource(), list(units)


def floating(value: Any) -> list[Tensor]:
    """The floating-point tensors with elements in nested tuples, lists and dicts."""
    return [t for t in all_tensors(value) if t.is_floating_point() and t.numel()]


def _is_head(name: str) -> bool:
    """Whether a module of an RoI head is a head: ``bbox_head``, ``mask_head.0``, ..."""
    first, _, rest = name.partition('.')
    return first.endswith('_head') and (not rest or rest.isdigit())


@contextmanager
def _calls_of(modules: Sequence[nn.Module], leave: bool = False) -> Iterator[list[Any]]:
    """While open, the list gets arguments and output of every call of the modules.

    Args:
        modules: Modules to watch.
        leave: Raise ``Reached`` behind the first call.
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
