# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gplq_mm.ops import QuantMatMul
from gplq_mm.ops.attention.dot_product import DotProductAttention
from gplq_mm.quantizers import FakeQuantizer, QuantSpec
from tests.helpers.reference import calibrated


def divided(q: Tensor, k: Tensor, v: Tensor, scale: float, **_: object) -> Tensor:
    """As mmpretrain's own function: the logits are divided."""
    return (q @ k.mT / scale).softmax(-1) @ v


class Attention(DotProductAttention, nn.Module):
    def __init__(self, attention: Callable[..., Tensor], examples: list[Tensor]) -> None:
        super().__init__()
        spec = QuantSpec(num_bits=8)
        q, k, p, v = (calibrated(FakeQuantizer(spec), x) for x in examples)
        self.qk_matmul, self.pv_matmul = QuantMatMul(q, k), QuantMatMul(p, v)
        self.attn_drop = 0.0
        self.scaled_dot_product_attention = attention


@pytest.mark.parametrize('attention', [F.scaled_dot_product_attention, partial(divided, scale=0.5)])
def test_quantized_it_is_close_and_off_it_is_the_float_function(
    attention: Callable[..., Tensor],
) -> None:
    q, k, v = (torch.randn(2, 2, n, 4) for n in (3, 5, 5))
    module = Attention(attention, [2 * q, k, torch.linspace(0, 1, 9), v]).eval()
    expected = attention(q, k, v)
    with torch.no_grad():
        error = (module.attend(q, k, v) - expected).norm()
    assert 0 < error < 0.05 * expected.norm()
    for quantizer in (m for m in module.modules() if isinstance(m, FakeQuantizer)):
        quantizer.enabled = False
    assert torch.equal(module.attend(q, k, v), expected)
