# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Time a linear layer on integers beside torch's float32 and oneDNN's int8 product.

Ours takes float inputs and gives float outputs: quantization, product, rescaling and bias. The
others are the product with bias alone: oneDNN gets 8-bit codes that are quantized already. Best of
many interleaved repetitions; the output is compared with 64-bit integers, at extreme codes too.

Example:
    python tools/benchmarks/integer_kernel.py --threads 1
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gplq_mm.ops import Engine, QuantLinear, swap_class
from gplq_mm.ops.backends.integer import kernels
from gplq_mm.quantizers import FakeQuantizer, PerChannel, QuantSpec

SHAPES = ((197, 384, 1536), (197, 1536, 384), (197, 384, 384), (3136, 96, 384), (49, 768, 3072))
"""Rows, inputs and outputs of layers of ViT-S and Swin-T."""
SCALE, ZERO = 0.25, 7.0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Time the integer kernel of a linear layer')
    parser.add_argument('--threads', type=int, default=1, help='threads of each product')
    parser.add_argument('--repetitions', type=int, default=50, help='runs of each product')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=3,
        action='append',
        metavar=('ROWS', 'INPUTS', 'OUTPUTS'),
        help='a shape to time instead of those of ViT-S and Swin-T; may be repeated',
    )
    return parser.parse_args(argv)


def quantized_layer(inputs: int, outputs: int) -> QuantLinear:
    """W4A4 layer whose weight holds random codes, extreme ones in the first two rows."""
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        codes = torch.randint(-8, 8, (outputs, inputs)).float()
        codes[:1], codes[1:2] = -8, 7
        layer.weight.copy_(codes * SCALE)
    swap_class(layer, QuantLinear)
    assert isinstance(layer, QuantLinear)
    activation = FakeQuantizer(QuantSpec(4, signed=False, symmetric=False))
    activation.set_qparams(torch.tensor(SCALE), torch.tensor(ZERO))
    weight = FakeQuantizer(QuantSpec(4, granularity=PerChannel(0)), outputs, 'weight')
    weight.set_qparams(torch.full((outputs,), SCALE), torch.zeros(outputs))
    layer.attach_quantizers(activation, weight)
    layer.engine = Engine(inference='integer')
    return layer


def expected(layer: QuantLinear, x: Tensor) -> Tensor:
    """Output by 64-bit integers, rescaled as in the simulation."""
    codes = layer.codes(x)
    total = codes['input'].codes.long() @ codes['weight'].codes.long().t()
    factor = codes['weight'].scale.flatten() * codes['input'].scale
    return total.float() * factor + layer.bias


def onednn_product(layer: QuantLinear, x: Tensor) -> Callable[[], Tensor] | None:
    """Product of 8-bit codes by oneDNN, or None where torch lacks it."""
    onednn = torch.ops.onednn
    if not (hasattr(onednn, 'qlinear_pointwise') and torch.backends.mkldnn.is_available()):
        return None
    codes = layer.codes(x)
    left = (codes['input'].codes + ZERO).to(torch.uint8)
    weight = onednn.qlinear_prepack(codes['weight'].codes.to(torch.int8), list(x.shape))
    scales = codes['weight'].scale.flatten()
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    return lambda: onednn.qlinear_pointwise(
        *(left, SCALE, int(ZERO), weight, scales, zeros, layer.bias),
        *(1.0, 0, torch.float32, 'none', [], ''),
    )


def best_times(products: dict[str, Callable[[], Tensor]], repetitions: int) -> dict[str, float]:
    """Shortest time of each in seconds; they run in turns."""
    best = dict.fromkeys(products, float('inf'))
    for _ in range(repetitions):
        for name, product in products.items():
            start = time.perf_counter()
            product()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


@torch.no_grad()
def measure(shape: Sequence[int], repetitions: int) -> tuple[dict[str, float], bool]:
    """Seconds of each product, and whether ours equals 64-bit integers."""
    torch.manual_seed(0)
    rows, inputs, outputs = shape
    layer = quantized_layer(inputs, outputs)
    x = torch.randn(rows, inputs)
    x[:1], x[1:2] = 1e3, -1e3  # the largest and the smallest code
    products = {
        'float32': lambda: F.linear(x, layer.weight, layer.bias),
        'integer': lambda: layer(x),
    }
    onednn = onednn_product(layer, x)
    if onednn is not None:
        products['oneDNN int8'] = onednn
    return best_times(products, repetitions), torch.equal(layer(x), expected(layer, x))


def main(argv: Sequence[str] | None = None) -> int:
    """Print a row per shape; 1 if an output is not exact."""
    args = parse_args(argv)
    loaded, description = kernels.load()
    if loaded is None:
        print(f'no integer kernels: {description}')
        return 1
    torch.set_num_threads(args.threads)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f'{description}; torch {torch.__version__}, {capability}, {args.threads} thread(s)')
    print(f'{"shape":>16} {"product":>12} {"us":>7} {"GMAC/s":>7} {"x float32":>9}  exact')
    all_exact = True
    for shape in args.shape or SHAPES:
        times, is_exact = measure(shape, args.repetitions)
        all_exact &= is_exact
        macs = shape[0] * shape[1] * shape[2]
        for name, seconds in times.items():
            ratio = times['float32'] / seconds
            exact = str(is_exact) if name == 'integer' else ''
            print(
                f'{"x".join(map(str, shape)):>16} {name:>12} {seconds * 1e6:7.0f} '
                f'{macs / seconds / 1e9:7.1f} {ratio:9.2f}  {exact}'
            )
    return 0 if all_exact else 1


if __name__ == '__main__':
    sys.exit(main())
