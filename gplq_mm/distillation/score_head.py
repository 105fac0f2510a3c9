# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Module that computes the class scores, of an image or of its pixels; integrations know it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

SCORES = 'scores'
"""Takes the place of a layer's name where the output of the score head is recorded."""


class ScoreHead(ABC):
    """The module that computes class scores from the result of ``extract_feat()``.

    Attributes:
        name: Name of the module in the model.
    """

    name: str

    @abstractmethod
    def logits(self, features: Any) -> Any:
        """Logits ``(N, classes)``, nested by task if there are several; N images or pixels."""

    @contextmanager
    def watched(self, model: Any, keep: Callable[[Any], None]) -> Iterator[None]:
        """Context manager: ``keep`` gets the logits that the model computes for its loss.

        Calls with labels are left out: they do not return plain logits.

        Args:
            model: Model with this head.
            keep: Called with what ``logits`` returns.
        """

        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if len(args) + len(kwargs) == 1:
                keep(output)

        module = model.get_submodule(self.name)
        handle = module.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @abstractmethod
    def penultimate(self, features: Any) -> list[Tensor]:
        """Inputs of the last layers, ``(N, C)`` each."""

    @property
    @abstractmethod
    def lacking(self) -> str:
        """Class of the first part without a penultimate feature; empty if each has one."""

    @abstractmethod
    def is_multi_label(self, task: str) -> bool:
        """Whether each logit of a task is a separate probability (sigmoid)."""


Find = Callable[[Any], ScoreHead | None]
_FIND: list[Find] = []


def register_score_head(find: Find) -> Find:
    """Function decorator: the function gives a model's score head, or None if it has none."""
    _FIND.append(find)
    return find


def score_head(model: Any) -> ScoreHead | None:
    """Score head that the first registered function finds; None without one."""
    return next((head for head in (find(model) for find in _FIND) if head is not None), None)
