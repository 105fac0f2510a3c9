# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Features of a model by which its quantized state is compared with the stage-1 state."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...stream import Reached, Unit
from ...stream.calls import floating_tensors
from ...stream.interception import run_until_reached


class FeatureSource:
    """Result of the forward pass: for models without a known quantized head."""

    def features(self, run: Callable[[], Any], index: int) -> list[Tensor]:
        """Floating-point tensors in which two models are compared.

        Args:
            run: The model's forward with a batch. The first call for a batch has to be made
                with the stage-1 model.
            index: Number of the batch on this rank.
        """
        return floating_tensors(run())


class HeadFeatures(FeatureSource):
    """Input and output of a head; the forward pass stops after it."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def features(self, run: Callable[[], Any], index: int) -> list[Tensor]:
        """As in the base class."""
        return floating_tensors(self.calls_of_head(run))

    def calls_of_head(self, run: Callable[[], Any]) -> list[Any]:
        """Arguments and output of the head's call; none if the batch does not reach it."""
        with calls_of([self.head], leave=True) as calls:
            run_until_reached(run)
        return calls


Chosen = tuple[FeatureSource, list[Unit]]
Choose = Callable[[Any, Sequence[Unit]], Chosen | None]
_CHOICES: list[Choose] = []


def register_feature_source(choose: Choose) -> Choose:
    """Function decorator: the function chooses the features of models that it knows.

    Args:
        choose: Gets model and units as ``feature_source`` does and returns what it returns; None
            leaves the choice to the next one.
    """
    _CHOICES.append(choose)
    return choose


def feature_source(model: Any, units: Sequence[Unit]) -> Chosen:
    """The features for a model, and the units that they depend on.

    The first registered choice counts; without one it is what the pass over the images gives.

    Args:
        model: Converted model.
        units: Its units, see ``find_units``, in execution order.
    """
    choices = (choose(model, units) for choose in _CHOICES)
    return next((found for found in choices if found), (FeatureSource(), list(units)))


@contextmanager
def calls_of(modules: Sequence[nn.Module], leave: bool = False) -> Iterator[list[Any]]:
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
