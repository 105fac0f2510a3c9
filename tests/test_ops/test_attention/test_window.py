# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import torch

from gplq_mm.ops.attention.window import biased, gathered_bias
from gplq_mm.ops.float_matmul import FloatMatMul


def test_biased_masks_each_window_with_its_own() -> None:
    logits = torch.randn(6, 2, 3, 3)  # 3 windows of 2 images
    mask = torch.zeros(3, 3, 3)
    mask[1, :, 0] = -100
    bias = torch.randn(1, 2, 3, 3)
    weights = biased(logits, bias, mask).softmax(-1)
    assert weights.shape == logits.shape
    masked = weights[:, :, :, 0].amax(dim=(1, 2)) < 1e-20
    assert masked.tolist() == [False, True, False] * 2
    assert torch.equal(biased(logits, bias), logits + bias)


def test_gathered_bias() -> None:
    table, index = torch.randn(4, 2), torch.tensor([[0, 1], [2, 3]])
    bias = gathered_bias(table, index)
    assert bias.shape == (1, 2, 2, 2)
    assert bias[0, 1, 1, 0] == table[2, 1]


def test_float_matmul_takes_codes_and_their_scale() -> None:
    codes, scale, rhs = torch.ones(2, 3), torch.tensor(0.5), torch.ones(3, 4)
    assert FloatMatMul.is_float
    assert torch.equal(FloatMatMul()(codes, rhs, scale), torch.full((2, 4), 1.5))
    assert list(FloatMatMul().state_dict()) == []
