# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Intercepts a model's forward passes, and stops them early."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from torch import nn

_ENTRIES = ('forward', 'extract_feat')
"""Methods with which a pass over images calls a model."""


class Reached(Exception):  # noqa: N818
    """Stops the model's forward pass when the required modules have run."""


@contextmanager
def intercepted(model: nn.Module, handle: Callable[[partial[Any]], None]) -> Iterator[None]:
    """Context manager: a call of the model calls ``handle`` with the forward, and returns None.

    Args:
        model: Its ``forward`` and ``extract_feat`` are replaced; calls between the two are
            not intercepted.
        handle: Called once for each batch of images, with the forward and its arguments.
    """
    own = {name: vars(model).get(name) for name in _ENTRIES if hasattr(model, name)}
    inside = False

    def take_over(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return original(*args, **kwargs)
            inside = True
            try:
                handle(partial(original, *args, **kwargs))
            finally:
                inside = False
            return None

        return call

    try:
        for name in own:
            vars(model)[name] = take_over(getattr(model, name))
        yield
    finally:
        for name, value in own.items():
            vars(model).pop(name, None)
            if value is not None:
                vars(model)[name] = value


def run_until_reached(run: Callable[[], Any]) -> None:
    """Call ``run``; it ends early if a hook raises ``Reached``."""
    with suppress(Reached):
        run()
