# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""CPU time of the passes over one activation: compiled from C, in torch, by torch.compile.

python tools/benchmarks/stage1_passes.py [--elements 302592] [--compile]
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from gplq_mm.analysis import format_table
from gplq_mm.quantizers.fake_quantizer import Grid
from gplq_mm.quantizers.functional import quantize
from gplq_mm.quantizers.packing import cpu_kernels, torch_passes


def milliseconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """Best CPU time of one call."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found[2:]) * 1e3


def plain_pack(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward pass as one expression, for ``torch.compile``."""
    ratio = x / scale
    rounded = torch.round(ratio)
    field = torch.clamp(torch.round((ratio - rounded) * 15), -7, 7) + 8
    field = torch.where((ratio > -8) & (ratio < 7), field, 0.0)
    codes = torch.clamp(rounded, -8, 7)
    return codes * scale, (codes * 16 + field).to(torch.int32).to(torch.int8)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--elements', type=int, default=8 * 197 * 192)
    parser.add_argument('--compile', action='store_true', help='try torch.compile too (slow)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, grad, scale, grid = torch.randn(args.elements), None, torch.tensor(0.3), Grid(-8, 7, 0.0)
    zero = torch.tensor(0.0)
    reference = milliseconds(lambda: quantize(x, scale, zero, -8, 7).sub_(zero).mul_(scale))
    rows = [['fake quantization in torch', f'{reference:.3f}', '', '']]
    kernels, description = cpu_kernels.load()
    for name, passes in (('compiled from C', kernels), ('in torch', torch_passes)):
        if passes is None:
            print(description)
            continue
        codes, grad = passes.pack(x, scale, grid)[1], torch.randn(args.elements)
        calls = (
            lambda p=passes: p.pack(x, scale, grid),
            lambda p=passes, c=codes: p.unpack(c, scale, grid),
            lambda p=passes, c=codes, g=grad: p.backward(c, None, g, scale, grid, True),
        )
        rows.append([f'packed codes, {name}', *(f'{milliseconds(c):.3f}' for c in calls)])
    if args.compile:
        start = time.process_time()
        compiled = torch.compile(plain_pack, dynamic=True)
        compiled(x, scale)
        print(f'torch.compile of one pass: {time.process_time() - start:.1f} s')
        taken = milliseconds(lambda: compiled(x, scale))
        rows.append(['packed codes, torch.compile', f'{taken:.3f}', '', ''])
    print(format_table(['ms', 'forward', 'unpack', 'backward'], rows))


if __name__ == '__main__':
    main()
