# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The C kernels of integer inference: loading, check on worst-case codes, calls."""

import ctypes
import functools
import threading
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ....quantizers.packing.c_library import load_functions

_SOURCE = Path(__file__).with_name('csrc') / 'integer_kernels.c'
_PANEL = 16
"""Columns of a panel, as in the C file."""
_SHORTEST_FLUSH = 4
"""Below this number of groups, widening sums of 16 bits costs more than 16-bit codes do."""
_PARALLEL_FROM = 1 << 18
"""Multiply-accumulates from which several threads are faster than one."""

Pointer = ctypes.c_void_p


class CGrid(ctypes.Structure):
    """``Grid`` of the C file."""

    _fields_ = [
        *((name, Pointer) for name in ('scale', 'zero')),
        ('step', ctypes.c_int64),
        *((name, ctypes.c_float) for name in ('qmin', 'qmax')),
        *((name, Pointer) for name in ('levels', 'thresholds')),
        ('num_levels', ctypes.c_int64),
        ('tree', Pointer),
    ]


class CProduct(ctypes.Structure):
    """``Product`` of the C file."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ('rows', 'columns', 'groups', 'wide', 'flush')),
        *(
            (n, Pointer)
            for n in ('right', 'sums', 'row_zero', 'row_scale', 'factor', 'bias', 'out')
        ),
        *((n, ctypes.c_int64) for n in ('row_step', 'column_step')),
    ]


class CWindow(ctypes.Structure):
    """``Window`` of the C file: geometry of a convolution."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ('batch', 'channels', 'height', 'width')),
        *(
            (f'{what}_{axis}', ctypes.c_int64)
            for what in ('kernel', 'stride', 'dilation')
            for axis in 'yx'
        ),
        *((n, ctypes.c_int64) for n in ('top', 'left', 'padded_height', 'padded_width')),
        *((n, ctypes.c_int64) for n in ('out_height', 'out_width')),
    ]


class CSide(ctypes.Structure):
    """``Side`` of the C file: one activation and its quantizer."""

    _fields_ = [
        ('x', Pointer),
        *((n, ctypes.c_int64) for n in ('outer', 'inner', 'row', 'column')),
        *((n, Pointer) for n in ('scale', 'zero')),
        *((n, ctypes.c_int64) for n in ('scale_batch', 'scale_step', 'zero_batch', 'zero_step')),
        ('extent', ctypes.c_int64),
        *((n, ctypes.c_float) for n in ('share', 'qmin', 'qmax')),
        *((n, Pointer) for n in ('levels', 'thresholds')),
        ('num_levels', ctypes.c_int64),
    ]


class COperands(ctypes.Structure):
    """``Operands`` of the C file: two activations."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ('outer', 'inner', 'depth')),
        *((n, CSide) for n in ('lhs', 'rhs')),
    ]


class CTerm(ctypes.Structure):
    """``Term`` of the C file: a step from the product of queries and keys to logits."""

    _fields_ = [
        ('x', Pointer),
        *((n, ctypes.c_int64) for n in ('period', 'outer', 'inner', 'row', 'column_outer')),
        *((n, ctypes.c_int64) for n in ('column', 'width', 'multiplies')),
    ]


class CSoftmax(ctypes.Structure):
    """``Softmax`` of the C file."""

    _fields_ = [
        ('exponential', Pointer),
        *((n, ctypes.c_int64) for n in ('lanes', 'count')),
        ('terms', ctypes.POINTER(CTerm)),
    ]


class Layout(NamedTuple):
    """How codes lie in memory.

    Attributes:
        wide: 1 for 16-bit codes, 0 for 8-bit ones.
        groups: Groups of 4 bytes along the sum.
        flush: Groups whose products are summed in 16 bits.
    """

    wide: int
    groups: int
    flush: int


@functools.lru_cache(1024)
def layout(left: int, right: int, depth: int) -> Layout | str:
    """Layout in which a product of codes is exact, or the reason that there is none.

    Args:
        left: Largest raw code (or level) of the left matrix.
        right: Largest magnitude of a centred code of the right matrix.
        depth: Number of products in a sum.

    Examples:
        >>> layout(15, 8, 384), layout(255, 128, 384)
        (Layout(wide=0, groups=96, flush=136), Layout(wide=1, groups=192, flush=1))
    """
    if left * max(right, 1) * depth >= 1 << 31:
        return f'sums of {depth} products of {left} and {right} exceed 32 bits'
    flush = 32767 // (2 * left * max(right, 1))
    if left <= 255 and right <= 127 and flush >= _SHORTEST_FLUSH:
        return Layout(0, -(-depth // 4), flush)
    if left > 32767 or right > 32767:
        return f'codes of {left} and {right} exceed 16 bits'
    return Layout(1, -(-depth // 2), 1)


class RightMatrix(NamedTuple):
    """A weight as the kernels read it.

    Attributes:
        layout: Layout of both matrices.
        codes: Centred codes in panels, int8.
        sums: Sum over the depth of codes times zero points, per column, int32.
        columns: Number of columns.
    """

    layout: Layout
    codes: Tensor
    sums: Tensor
    columns: int


class Kernels:
    """The compiled functions.

    Args:
        library: The loaded library.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.arrange_in_c = library.gplq_integer_arrange
        self.linear, self.conv = library.gplq_integer_linear, library.gplq_integer_conv
        self.matmul, self.attention = library.gplq_integer_matmul, library.gplq_integer_attention
        self.softmax = library.gplq_integer_softmax
        self.arrange_in_c.restype = self.softmax.restype = None
        for function in (self.linear, self.conv, self.matmul, self.attention):
            function.restype = ctypes.c_int

    def arrange(self, codes: Tensor, zero: Tensor, form: Layout) -> RightMatrix:
        """Right matrix from ``(columns, depth)`` centred codes and ``(depth,)`` raw zero points."""
        columns, depth = codes.shape
        codes, zero = codes.float().contiguous(), zero.float().contiguous()
        panels = -(-columns // _PANEL)
        right = torch.empty(panels * form.groups * 4 * _PANEL, dtype=torch.int8)
        sums = torch.empty(columns, dtype=torch.int32)
        self.arrange_in_c(
            *_pointers(codes, zero),
            *map(ctypes.c_int64, (columns, depth, form.wide)),
            *_pointers(right, sums),
        )
        return RightMatrix(form, right, sums, columns)


def product(
    right: RightMatrix, rows: int, factor: Tensor, bias: Tensor | None, out: Tensor
) -> CProduct:
    """Arguments of a product whose output is ``(rows, columns)``, dense."""
    return CProduct(
        rows,
        right.columns,
        *(right.layout.groups, right.layout.wide, right.layout.flush),
        *(right.codes.data_ptr(), right.sums.data_ptr(), None, None, factor.data_ptr()),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        right.columns,
        1,
    )


class _Workspace(threading.local):
    """Memory of one thread for codes, kept from call to call: fresh memory costs page faults."""

    buffer = torch.empty(0, dtype=torch.uint8)


_WORKSPACE = _Workspace()


def workspace(size: int) -> Pointer:
    """At least ``size`` bytes of the thread's own, valid until its next call."""
    if len(_WORKSPACE.buffer) < size:
        _WORKSPACE.buffer = torch.empty(size, dtype=torch.uint8)
    return Pointer(_WORKSPACE.buffer.data_ptr())


def threads_for(macs: int) -> ctypes.c_int64:
    """Number of threads for an operation of so many multiply-accumulates."""
    return ctypes.c_int64(torch.get_num_threads() if macs > _PARALLEL_FROM else 1)


def completed(status: int) -> bool:
    """Whether a kernel has computed its output; False if an input is NaN.

    Raises:
        MemoryError: If the kernel got no memory for its buffers.
    """
    if status == 2:
        raise MemoryError('integer inference: no memory for the codes of an operation')
    return status == 0


def _pointers(*tensors: Tensor) -> list[Pointer]:
    return [Pointer(tensor.data_ptr()) for tensor in tensors]


@functools.cache
def load() -> tuple[Kernels | None, str]:
    """Compile, load and check the kernels once.

    Returns:
        ``(kernels, description)``; without kernels the first is None and the description
        gives the reason.
    """
    kernels, reason = load_functions(_SOURCE, Kernels)
    if kernels is None:
        return None, reason
    for left, right in ((15, 8), (255, 16), (255, 128), (16384, 15)):
        if not _is_exact(kernels, left, right):
            return None, f'wrong sums of codes up to {left} and {right} on this processor'
    return kernels, 'kernels compiled from C'


def loaded() -> Kernels:
    """The kernels, for callers whose call was not refused."""
    kernels = load()[0]
    assert kernels is not None
    return kernels


def _is_exact(kernels: Kernels, left: int, right: int) -> bool:
    """Whether worst-case codes give the sums of 64-bit integers, at an odd shape."""
    rows, columns, depth = 7, 19, 1031
    form = layout(left, right, depth)
    assert isinstance(form, Layout)
    weight = torch.full((columns, depth), -float(right))
    weight[1::2] = right if right in (16, 15) else right - 1
    zero, one = torch.zeros(depth), torch.ones(columns)
    matrix = kernels.arrange(weight, zero, form)
    x, out = torch.full((rows, depth), float(left)), torch.empty(rows, columns)
    levels = torch.tensor([0.0, left])
    limits = torch.tensor([-float('inf'), 0.5])
    grid = CGrid(one.data_ptr(), zero.data_ptr(), 0, 0, min(left, 255))
    if left > 255:
        grid.levels, grid.thresholds, grid.num_levels = levels.data_ptr(), limits.data_ptr(), 2
    buffer = torch.empty(rows * form.groups * 4, dtype=torch.uint8)
    status = kernels.linear(
        ctypes.byref(grid),
        ctypes.byref(product(matrix, rows, one, None, out)),
        *_pointers(x),
        ctypes.c_int64(depth),
        *_pointers(buffer),
        ctypes.c_int64(1),
    )
    expected = (x.long() @ weight.long().t()).float()
    return completed(status) and torch.equal(out, expected)
