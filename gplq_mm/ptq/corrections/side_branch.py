# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Linear side branches of transformer blocks: ``block(x) + W x + b``.

Branches are attached when the model is built, unfitted (the block is unchanged), so
that checkpoints load; ``qwt`` fits the values. A fitted branch multiplies float32
numbers, so the model is not integer-only; ``compensation_cost`` counts the operations.

Source: arXiv 2411.13918 (QwT), section 3.2.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...compat.torch import LoadsState
from ...ops import swap_class
from ...stream.blocks import block_width, find_blocks

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class LinearCompensation(LoadsState):
    """The side branch of one block, ``(..., C)`` -> ``(..., C)``.

    Weight and bias are buffers: they are saved, but not trained.

    Args:
        width: Channels C of the block.

    Attributes:
        weight: ``(C, C)``, float32.
        bias: ``(C,)``, float32.
        fitted: Whether the branch is fitted; the block ignores an unfitted branch.
        enabled: Whether a fitted branch is used.
    """

    weight: Tensor
    bias: Tensor
    fitted: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer('weight', torch.zeros(width, width))
        self.register_buffer('bias', torch.zeros(width))
        self.register_buffer('fitted', torch.tensor(False))
        self.enabled = True
        self._is_fitted = False

    @property
    def is_fitted(self) -> bool:
        """Whether the branch is fitted (stored outside the buffer to avoid synchronizing)."""
        return self._is_fitted

    @property
    def is_active(self) -> bool:
        """Whether the block adds the branch."""
        return self.enabled and self._is_fitted

    @torch.no_grad()
    def set_values(self, weight: Tensor, bias: Tensor) -> None:
        """Store ``weight`` ``(C, C)`` and ``bias`` ``(C,)`` and mark the branch fitted."""
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        self.fitted.fill_(True)
        self._is_fitted = True

    @torch.no_grad()
    def clear(self) -> None:
        """Make the branch unfitted again."""
        for buffer in (self.weight, self.bias, self.fitted):
            buffer.zero_()
        self._is_fitted = False

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias`` in the dtype of ``x``, tokens ``(..., C)``."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    def after_load(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Store whether the branch is fitted, to avoid later device synchronizations."""
        if prefix + 'fitted' in state_dict:
            self._is_fitted = bool(self.fitted)

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return f'width={len(self.bias)}, fitted={self._is_fitted}'


class CompensatedBlock(_Base):
    """Mixin for a block that adds the side branch of its first input to its output.

    The block's class is swapped in place: its keys stay, ``compensation.*`` is added.
    """

    compensation: LinearCompensation

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Forward of the float class, plus the branch if it is fitted; tokens ``(B, ..., C)``."""
        if not self.compensation.is_active:
            return super().forward(x, *args, **kwargs)
        side = self.compensation(x)
        return super().forward(x, *args, **kwargs) + side


def attach_compensation(model: nn.Module, blocks: str | Sequence[str] = 'auto') -> list[str]:
    """Attach an unfitted side branch to transformer blocks, in place.

    Call it on the converted model before loading a checkpoint. Existing branches are
    kept.

    Args:
        model: Converted model.
        blocks: ``auto`` or shell patterns of block names, see ``find_blocks``.

    Returns:
        Names of the chosen blocks, in model order.

    Raises:
        ValueError: If no block is found or a pattern matches none.
    """
    found = find_blocks(model, blocks)
    for block in found.values():
        if isinstance(block, CompensatedBlock):
            continue
        device = next(block.parameters()).device
        branch = LinearCompensation(block_width(block)).to(device)
        swap_class(block, _compensated_class(type(block)))
        block.compensation = branch
    return list(found)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _compensated_class(cls: type[nn.Module]) -> type[nn.Module]:
    """One subclass per block class, so that equal blocks have equal types."""
    if cls not in _CLASSES:
        name, bases = f'Compensated{cls.__name__}', (CompensatedBlock, cls)
        _CLASSES[cls] = type(name, bases, {'__module__': __name__})
    return _CLASSES[cls]


def detach_compensation(model: nn.Module) -> None:
    """Remove all side branches and restore the classes of the blocks."""
    for block in compensated_blocks(model).values():
        del block.compensation
        block.__class__ = type(block).__mro__[2]


def compensated_blocks(model: nn.Module) -> dict[str, CompensatedBlock]:
    """Blocks with a side branch, fitted or not, by name, in model order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, CompensatedBlock)}


def compensation_cost(model: nn.Module) -> dict[str, int]:
    """Size and operations of the fitted branches.

    Returns:
        ``side_params``: number of float32 parameters; ``side_macs_per_token``: float
        multiply-accumulates per token, summed over the fitted blocks.
    """
    widths = [
        len(b.compensation.bias)
        for b in compensated_blocks(model).values()
        if b.compensation.is_fitted
    ]
    return {
        'side_params': sum(w * w + w for w in widths),
        'side_macs_per_token': sum(w * w for w in widths),
    }


@contextmanager
def compensation_off(model: nn.Module) -> Iterator[None]:
    """Context manager: no block adds its branch."""
    branches = [b.compensation for b in compensated_blocks(model).values()]
    enabled = [branch.enabled for branch in branches]
    try:
        for branch in branches:
            branch.enabled = False
        yield
    finally:
        for branch, value in zip(branches, enabled, strict=True):
            branch.enabled = value
