# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""See every matrix product and convolution that torch executes, from below the modules."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

OPERANDS = {'mm': (0, 1), 'addmm': (1, 2), 'bmm': (0, 1), 'baddbmm': (1, 2), 'convolution': (0, 1)}
"""ATen operator -> positions of its two operands."""
FORBIDDEN = ('scaled_dot_product', 'linear', 'matmul', 'einsum', 'mv', 'dot', 'addmv', 'conv')
"""Products of which the operands are not seen as such: none may be executed."""


@dataclass
class ExecutedProduct:
    """One executed product: operator, where, its operands."""

    operator: str
    module: str
    lhs: Tensor
    rhs: Tensor


@dataclass
class Recorder:
    """What was executed while recording."""

    products: list[ExecutedProduct] = field(default_factory=list)
    forbidden: list[str] = field(default_factory=list)
    trail: list[str] = field(default_factory=list)


class _Mode(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.__name__.split('.')[0].lstrip('_')
        where = self.recorder.trail[-1] if self.recorder.trail else ''
        if name in OPERANDS:
            lhs, rhs = (args[i].detach().clone() for i in OPERANDS[name])
            self.recorder.products.append(ExecutedProduct(name, where, lhs, rhs))
        elif name.startswith(FORBIDDEN) or 'attention' in name:
            self.recorder.forbidden.append(f'{func} in {where}')
        return func(*args, **(kwargs or {}))


@contextmanager
def record_products(model: nn.Module) -> Iterator[Recorder]:
    """Record the products executed while open, each with the innermost module's name."""
    recorder = Recorder()
    handles = []
    for name, module in model.named_modules():
        enter = lambda *_, name=name: recorder.trail.append(name)  # noqa: E731
        leave = lambda *_: (recorder.trail.pop(), None)[1]  # noqa: E731
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with _Mode(recorder):
            yield recorder
    finally:
        for handle in handles:
            handle.remove()


def is_allowed(product: ExecutedProduct, allowed: dict[str, str]) -> bool:
    """Whether a product lies in a module that an allow-list names."""
    return any(fnmatchcase(product.module, pattern) for pattern in allowed)


def is_integer(x: Tensor, num_bits: int, axis: int | None = None, vectors: bool = False) -> bool:
    """Whether each group of values is integers in a range of ``num_bits`` bits, see `groups`."""
    if not bool((x == x.round()).all()):
        return False
    spans = [row.max() - row.min() for row in groups(x, axis, vectors)]
    return bool(torch.stack(spans).max() < 2**num_bits)


def is_on_grid(x: Tensor, num_bits: int, axis: int | None = None, vectors: bool = False) -> bool:
    """Whether each group has at most ``2 ** num_bits`` values, see `groups`."""
    rows = groups(x, axis, vectors).sort(1).values
    return bool(((rows.diff(dim=1) != 0).sum(1) < 2**num_bits).all())


def groups(x: Tensor, axis: int | None = None, vectors: bool = False) -> Tensor:
    """Values that share a scale as rows.

    Args:
        x: Operand of a product.
        axis: None for one group; with `vectors` the axis along which a vector lies, else
            the axis at each index of which there is a group.
        vectors: Whether every vector along the axis is a group.
    """
    if axis is None:
        return x.reshape(1, -1)
    return x.movedim(axis, -1).flatten(0, -2) if vectors else x.movedim(axis, 0).flatten(1)
