# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The packed passes in C, compiled on a CPU if a compiler is installed.

One pass over memory instead of a dozen. If they cannot be compiled, the passes in torch are used
instead.
"""

import ctypes
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..log_codes import thresholds, upper_bound
from .c_library import load_functions

if TYPE_CHECKING:
    from ..fake_quantizer import Grid

_SOURCE = Path(__file__).with_name('csrc') / 'packed_kernels.c'
_PARALLEL_FROM = 1 << 15
"""Number of elements from which several threads are faster than one."""
_BLOCK, _ROWS = 4096, 64
"""As in the C file: elements, or rows of channels, per partial sum."""
_READS = (torch.float32, torch.int8)
_NAMES = ('pack', 'quantize', 'unpack', 'backward', 'softmax_backward')


class CGrid(ctypes.Structure):
    """``Grid`` of the C file."""

    _fields_ = [
        ('scale', ctypes.c_void_p),
        ('zero_point', ctypes.c_void_p),
        ('groups', ctypes.c_int64),
        ('outer', ctypes.c_int64),
        ('channels', ctypes.c_int64),
        ('inner', ctypes.c_int64),
        ('qmin', ctypes.c_float),
        ('qmax', ctypes.c_float),
        ('offset', ctypes.c_float),
        ('slack', ctypes.c_float),
        ('upper', ctypes.c_float),
        ('levels', ctypes.c_void_p),
        ('thresholds', ctypes.c_void_p),
        ('num_levels', ctypes.c_int),
        ('narrow', ctypes.c_int),
        ('threads', ctypes.c_int),
    ]


class Kernels:
    """The compiled passes; its methods match the functions of ``torch_passes``.

    Args:
        library: The loaded library.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {name: getattr(library, f'gplq_{name}') for name in _NAMES}
        for function in self._functions.values():
            function.restype = None

    def pack(self, x: Tensor, scale: Tensor, grid: 'Grid') -> tuple[Tensor, Tensor, Tensor | None]:
        """``(values, codes, fields)``; codes contain the fields if both fit into a byte."""
        x = _dense(x)
        values, codes = torch.empty_like(x), torch.empty_like(x, dtype=torch.int8)
        field = None if grid.is_narrow else torch.empty_like(codes)
        self._call('pack', _Layout(x, scale, grid), x, values, codes, field)
        return values, codes, field

    def quantize(self, x: Tensor, scale: Tensor, grid: 'Grid') -> Tensor:
        """Values on the grid, shape of ``x``."""
        x = _dense(x)
        values = torch.empty_like(x)
        self._call('quantize', _Layout(x, scale, grid), x, values)
        return values

    def unpack(self, codes: Tensor, scale: Tensor, grid: 'Grid') -> Tensor:
        """Values of packed codes, same shape."""
        values = torch.empty_like(codes, dtype=torch.float32)
        self._call('unpack', _Layout(codes, scale, grid), codes, values)
        return values

    def backward(
        self,
        codes: Tensor,
        field: Tensor | None,
        grad: Tensor,
        scale: Tensor,
        grid: 'Grid',
        of_scale: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """``(grad_x, grad_scale)``; ``grad`` is overwritten."""
        layout = _Layout(codes, scale, grid)
        sums = layout.partial_sums()
        self._call('backward', layout, codes, field, grad, sums)
        return grad, layout.total(sums) if of_scale else None

    def softmax_backward(
        self, p: Tensor, grad: Tensor, scale: Tensor, grid: 'Grid', of_scale: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``(grad_logits, grad_scale)``; ``grad`` is overwritten."""
        layout = _Layout(p, scale, grid)
        width = p.shape[-1]
        sums = layout.row_sums(width)
        self._call('softmax_backward', layout, p, grad, ctypes.c_int64(width), sums)
        return grad, layout.total(sums) if of_scale else None

    def _call(self, name: str, layout: '_Layout', *arguments: Any) -> None:
        pointers = [
            ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments
        ]
        self._functions[name](ctypes.byref(layout.grid), *pointers)


class _Layout:
    """Memory layout of a dense tensor and its scale: ``(G, A, C, I)``, ``G * C`` scales.

    Args:
        x: Dense tensor.
        scale: Broadcasts to it, see ``fits``.
        grid: Codes allowed.
    """

    def __init__(self, x: Tensor, scale: Tensor, grid: 'Grid') -> None:
        self.shape = scale.shape
        self.order, self.around = _around(x, scale)
        # references keep the tensors alive while C reads them
        self._scale, zero_point = self._in_memory_order(scale), grid.zero_point
        if isinstance(zero_point, Tensor):
            self._zero_point: Any = self._in_memory_order(zero_point)
            address = self._zero_point.data_ptr()
        else:
            self._zero_point = torch.full((scale.numel(),), float(zero_point))
            address = self._zero_point.data_ptr()
        self._levels = self._thresholds = torch.empty(0)
        upper = 0.0
        if grid.levels is not None:
            self._levels, self._thresholds = grid.levels.float(), thresholds(grid.levels)
            upper = float(upper_bound(grid.levels))
        self.grid = CGrid(
            self._scale.data_ptr(),
            address,
            *self.around,
            grid.qmin,
            grid.qmax,
            grid.offset,
            grid.slack,
            upper,
            self._levels.data_ptr(),
            self._thresholds.data_ptr(),
            len(self._levels),
            grid.is_narrow,
            torch.get_num_threads() if x.numel() > _PARALLEL_FROM else 1,
        )

    def _in_memory_order(self, values: Tensor) -> Tensor:
        """Scales or zero points in the order in which C reads them."""
        if values.numel() == 1 or not self.order:
            return values.contiguous()
        return values.permute(self.order).contiguous()

    def partial_sums(self) -> Tensor:
        """Buffer for partial sums; their order, and so the result, does not depend on threads."""
        groups, outer, channels, inner = self.around
        if inner == 1:
            return torch.zeros(groups, -(-outer // _ROWS), channels, 1, dtype=torch.float64)
        return torch.zeros(1, outer, channels, -(-inner // _BLOCK), dtype=torch.float64)

    def row_sums(self, width: int) -> Tensor:
        """Buffer for the softmax: one sum per row."""
        _, outer, channels, inner = self.around
        return torch.zeros(1, outer, channels, inner // width, dtype=torch.float64)

    def total(self, sums: Tensor) -> Tensor:
        """Sum for each scale, float32, shape of the scale."""
        of_scales = sums.sum((1, 3)).float()
        if of_scales.numel() == 1 or not self.order:
            return of_scales.view(self.shape)
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return of_scales.view([self.shape[d] for d in self.order]).permute(inverse)


def fits(x: Tensor, scale: Tensor) -> bool:
    """Whether C supports the shape and layout of a tensor and its scales."""
    return _around(x, scale)[1][0] > 0


def _around(x: Tensor, scale: Tensor) -> tuple[list[int], tuple[int, int, int, int]]:
    """Axes in memory order, and the tensor's shape as ``(G, A, C, I)``.

    The axes of the scales are adjacent in memory, C, or the outermost and the innermost
    ones, G and C. For other layouts the shape is all 0.
    """
    if scale.numel() == 1:
        return [], (1, 1, 1, x.numel())
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    shape = (1,) * (x.dim() - scale.dim()) + tuple(scale.shape)
    runs: list[tuple[bool, int]] = []  # adjacent axes with and without scales, and their elements
    for d in order:
        size, has_scales = x.shape[d], shape[d] > 1
        if size != 1 and runs and runs[-1][0] == has_scales:
            runs[-1] = has_scales, runs[-1][1] * size
        elif size != 1:
            runs.append((has_scales, size))
    kinds, sizes = [has for has, _ in runs], [size for _, size in runs]
    if kinds == [True, False, True]:
        return order, (sizes[0], sizes[1], sizes[2], 1)
    if kinds.count(True) != 1:
        return order, (0, 0, 0, 0)
    at = kinds.index(True)
    before, after = math.prod(sizes[:at]), math.prod(sizes[at + 1 :])
    return (order if scale.dim() == x.dim() else []), (1, before, sizes[at], after)


def _dense(x: Tensor) -> Tensor:
    """``x`` without gaps in memory, in the layout of elementwise results."""
    like = torch.empty_like(x)
    return x if like.stride() == x.stride() else like.copy_(x)


def _like_dense(x: Tensor) -> Tensor:
    """A meta tensor with the layout of ``_dense(x)``."""
    return torch.empty_like(x, device='meta')


def kernels_for(*tensors: Tensor) -> Kernels | None:
    """The compiled passes, or None if they do not support the tensors.

    Args:
        tensors: All tensors that a pass reads, the scale last. All must be on the CPU (torch
            also accepts a scalar scale on another device), the scale's axes as in ``fits``.
    """
    on_cpu = all(t.device.type == 'cpu' and t.dtype in _READS for t in tensors)
    if not on_cpu or torch.compiler.is_compiling():
        return None
    if not fits(_like_dense(tensors[0]), tensors[-1]):
        return None
    return load()[0]


@functools.cache
def load() -> tuple[Kernels | None, str]:
    """Compile and load the library once.

    Returns:
        ``(kernels, description)``; without kernels the first is None and the description
        gives the reason.
    """
    kernels, reason = load_functions(_SOURCE, Kernels)
    return kernels, f'passes in torch ({reason})' if reason else 'passes compiled from C'
