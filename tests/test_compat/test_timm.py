# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What we use of timm's internals exists and does what `gplq_mm/compat/timm.py` says."""

from __future__ import annotations

import pytest
import torch

timm = pytest.importorskip('timm')
from timm.models import beit  # noqa: E402

from gplq_mm.compat.timm import relative_position_bias  # noqa: E402


def test_timm_still_has_get_rel_pos_bias() -> None:
    assert hasattr(beit.Attention, '_get_rel_pos_bias'), (
        f'timm {timm.__version__} has no beit.Attention._get_rel_pos_bias: '
        'change gplq_mm/compat/timm.py'
    )


def test_relative_position_bias_is_what_the_attention_adds() -> None:
    attention = beit.Attention(8, num_heads=2, qkv_bias=True, window_size=(3, 3)).eval()
    torch.nn.init.normal_(attention.relative_position_bias_table)
    x = torch.randn(1, 10, 8)
    bias = relative_position_bias(attention)
    assert bias.shape == (1, 2, 10, 10)
    q_bias = torch.cat((attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias))
    qkv = torch.nn.functional.linear(x, attention.qkv.weight, q_bias)
    q, k, v = qkv.reshape(1, 10, 3, 2, 4).permute(2, 0, 3, 1, 4)
    weights = (q * attention.scale @ k.transpose(-2, -1) + bias).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).reshape(1, 10, 8))
    torch.testing.assert_close(attention(x), expected)
