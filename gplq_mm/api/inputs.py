# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Batches that a loader yields, and calls of a model with them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..stream.calls import all_tensors
from ..stream.distributed import world
from ..stream.evaluating import evaluating
from .model_state import device_of

Inputs = Tensor | Mapping[str, Any]
"""A batch for ``model(x)``, or keyword arguments for ``model(**x)``."""
ForwardLoop = Callable[[nn.Module], Any]
"""Runs a model over the calibration images: the same ones, in the same order, in every call."""
Run = Callable[[nn.Module], Any]
"""Runs a model with one batch."""
_YIELDS = (
    'a tensor (B, ...), a tuple or list that begins with one, or a dict of tensors that are the '
    "model's keyword arguments; for anything else give forward_loop=lambda model: ..."
)


def model_inputs(batch: Any) -> Inputs:
    """The model's input: a batch, or the first element of a tuple or list.

    Raises:
        ValueError: If that is neither a tensor nor a dict.
    """
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(first, Tensor | Mapping):
        return first
    raise ValueError(f'the loader yields {type(batch).__name__}; it has to yield {_YIELDS}')


def to_device(value: Any, device: torch.device) -> Any:
    """The tensors of a batch on a device; also in nested dicts, tuples and lists."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(to_device(item, device) for item in value)
    return value


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """``model(x)``, or ``model(**x)`` for a dict, on the model's device."""
    inputs = to_device(inputs, device_of(model))
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


@dataclass(frozen=True)
class CalibrationBatches:
    """Images held in memory and cut into batches, so that every pass sees the same ones.

    Attributes:
        images: Each ``(1, ...)``, or a dict of such tensors.
        batch_size: Images per forward pass.
    """

    images: list[Inputs]
    batch_size: int

    def batches(self) -> list[Inputs]:
        """This rank's share of the batches; images of another shape start another batch."""
        groups: list[list[Inputs]] = []
        for image in self.images:
            is_full = not groups or len(groups[-1]) == self.batch_size
            if is_full or _form(groups[-1][0]) != _form(image):
                groups.append([])
            groups[-1].append(image)
        rank, ranks = world()
        return [_joined(group) for group in groups[rank::ranks]]

    def first(self, number: int) -> 'CalibrationBatches':
        """The first images."""
        return CalibrationBatches(self.images[:number], self.batch_size)

    def following(self, number: int, most: int) -> 'CalibrationBatches':
        """At most so many images after the first ones; the first ones if there are no others."""
        others = self.images[number : number + most] or self.images[:most]
        return CalibrationBatches(others, self.batch_size)

    def runs(self) -> list[Run]:
        """This rank's batches as functions that run a model with one batch."""
        return [partial(call_model, inputs=batch) for batch in self.batches()]

    def run_pass(self, model: nn.Module) -> Callable[[], None]:
        """A function that runs the model over the batches, without gradients."""

        def run() -> None:
            with torch.no_grad(), evaluating(model):
                for batch in self.batches():
                    call_model(model, batch)

        return run


def collect(loader: Iterable[Any], num_images: int, batch_size: int) -> CalibrationBatches:
    """The first images of a loader.

    Args:
        loader: See ``gplq_mm.calibrate``.
        num_images: Images to take, or all if there are fewer.
        batch_size: Images per forward pass; the loader's own batch size is not used.

    Raises:
        ValueError: If the loader is empty or yields something else.
    """
    if isinstance(loader, Tensor):
        raise ValueError('loader is a tensor, whose rows are not batches; write x.split(8)')
    images: list[Inputs] = []
    for batch in loader:
        images += _single(model_inputs(batch))
        if len(images) >= num_images:
            break
    if not images:
        raise ValueError('the loader is empty (or used up: a generator runs once); give images')
    return CalibrationBatches(images[:num_images], batch_size)


def loop_pass(model: nn.Module, forward_loop: ForwardLoop) -> Callable[[], None]:
    """A function that runs the user's loop, without gradients."""

    def run() -> None:
        with torch.no_grad(), evaluating(model):
            forward_loop(model)

    return run


@contextmanager
def recorded_calls(model: nn.Module, num_images: int) -> Iterator[list[Run]]:
    """Context manager: a list that gets the model's first calls, to be made again.

    Args:
        model: The model.
        num_images: Images to record over all ranks, counted by the length of the first tensor;
            calls are not divided.
    """
    calls: list[Run] = []
    most, seen = -(-num_images // world()[1]), 0

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen
        if seen < most:
            calls.append(partial(_call, args=args, kwargs=kwargs))
            seen += images_of(calls[-1])

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def images_of(run: Any) -> int:
    """Number of images of a recorded call: length of its first tensor with a batch axis."""
    given = run.keywords
    return next((len(t) for t in all_tensors((given['args'], given['kwargs'])) if t.dim()), 1)


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def _single(inputs: Inputs) -> list[Inputs]:
    """A batch as single images, each with a batch axis."""
    if isinstance(inputs, Tensor):
        return list(inputs.split(1)) if inputs.dim() else [inputs]
    odd = [k for k, v in inputs.items() if not isinstance(v, Tensor) or not v.dim()]
    if odd or len({len(v) for v in inputs.values()}) != 1:
        raise ValueError(
            f'the loader yields a dict whose {odd or list(inputs)} are not tensors of one length; '
            f'it has to yield {_YIELDS}'
        )
    parts = [v.split(1) for v in inputs.values()]
    return [dict(zip(inputs, image, strict=True)) for image in zip(*parts, strict=True)]


def _form(image: Inputs) -> Any:
    """Key that is equal for images of one batch."""
    if isinstance(image, Tensor):
        return image.shape, image.dtype
    return {key: _form(value) for key, value in image.items()}


def _joined(images: list[Inputs]) -> Inputs:
    if len(images) == 1:
        return images[0]
    if isinstance(images[0], Tensor):
        return torch.cat(images)  # type: ignore[arg-type]
    return {key: torch.cat([image[key] for image in images]) for key in images[0]}  # type: ignore[index]
