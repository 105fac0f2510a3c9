# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Swin's layers in a form that an export captures for images of any size."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn

Size = tuple[int, int]


@contextmanager
def any_size(model: nn.Module) -> Iterator[None]:
    """Within this context Swin's windows, masks and padding follow the size of the images.

    The forward functions of the window attention, the patch merging and the adaptive padding of
    mmdet and mmpretrain are replaced by equal ones, whose steps are single nodes of the graph.

    Args:
        model: Its modules get another ``forward`` for the time.
    """
    changed = []
    for module in model.modules():
        forward = _form_of(module)
        if forward is not None:
            module.forward = MethodType(forward, module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def unlike_at_one_size(model: nn.Module) -> list[str]:
    """Names of window attentions that compute a map of one window in another way.

    mmpretrain's do not shift it unless ``pad_small_map`` is set: one graph cannot do both.
    """
    return [n for n, m in model.named_modules() if not getattr(m, 'pad_small_map', True)]


def _form_of(module: Any) -> Any:
    """The other forward function of a module, or None."""
    if callable(getattr(module, 'window_reverse', None)) and hasattr(module, 'w_msa'):
        return _attention
    kind, step = type(module).__name__, getattr(module, 'stride', None)
    if kind == 'AdaptivePadding' and module.padding == 'corner' and module.kernel_size == step:
        return _padding
    if isinstance(module, nn.Unfold) and module.kernel_size == step and _fills(module):
        return _unfold
    return None


def _fills(unfold: nn.Unfold) -> bool:
    """Whether the blocks lie side by side, without padding."""
    return unfold.padding in (0, (0, 0)) and unfold.dilation in (1, (1, 1))


def _attention(self: Any, query: Tensor, hw_shape: Size) -> Tensor:
    """``ShiftWindowMSA.forward``, ``(B, H * W, C)`` -> same."""
    from ...onnx.window_ops import merged, window_mask, windows

    size, shift = self.window_size, self.shift_size
    x = query.unflatten(1, tuple(hw_shape))  # (B, H, W, C)
    mask = window_mask(x, size, shift) if shift else None
    x = merged(self.w_msa(windows(x, size, shift), mask=mask), x, size, shift)
    return self.drop(x.flatten(1, 2))


def _padding(self: Any, x: Tensor) -> Tensor:
    """``AdaptivePadding.forward``, ``(B, C, H, W)``, with zeros up to a multiple of the stride."""
    from ...onnx.window_ops import padded

    return padded(x, *self.stride)


def _unfold(self: Any, x: Tensor) -> Tensor:
    """``nn.Unfold.forward``, ``(B, C, H, W)`` -> ``(B, C * rows * columns, blocks)``."""
    rows, columns = self.kernel_size
    B, C, H, W = x.shape
    blocks = x.view(B, C, H // rows, rows, W // columns, columns)
    return blocks.permute(0, 1, 3, 5, 2, 4).reshape(B, C * rows * columns, -1)
