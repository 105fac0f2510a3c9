# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Facts about a model that its layers do not show; integrations know its library and give them."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ModelFacts:
    """What conversion and both stages have to be told about a model.

    The defaults hold for a model that no integration describes.

    Attributes:
        is_detector: Whether ``auto`` in a recipe means the numbers for dense prediction: detectors
            and segmentors.
        scope: The recipe's ``scope`` that ``auto`` means.
        compensates: Whether ``stage2.compensation='auto'`` adds side branches.
        unpaired: Parts of dotted module names, ``('heads',)``: such modules get samples that the
            model chooses itself, so their inputs in two models do not belong together.
    """

    is_detector: bool = False
    scope: str = 'all'
    compensates: bool = True
    unpaired: tuple[str, ...] = ()


Describe = Callable[[nn.Module], ModelFacts | None]
_DESCRIBE: list[Describe] = []


def register_model_facts(describe: Describe) -> Describe:
    """Function decorator: the function gives a model's facts, or None for a model unknown to it."""
    _DESCRIBE.append(describe)
    return describe


def facts_of(model: nn.Module) -> ModelFacts:
    """Facts of the first registered function that knows the model; else the defaults.

    Args:
        model: Float or converted model; both give the same.
    """
    found = (describe(model) for describe in _DESCRIBE)
    return next((facts for facts in found if facts is not None), ModelFacts())
