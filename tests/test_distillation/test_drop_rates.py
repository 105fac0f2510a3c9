# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Dropout and stochastic depth turned off for stage 1."""

import pytest
import torch
from torch import nn

from gplq_mm.distillation.drop_rates import set_drop_rates_


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob


class WindowMSA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_drop = 0.2


def model() -> nn.Module:
    attention = nn.MultiheadAttention(4, 1, dropout=0.3)
    return nn.Sequential(DropPath(0.1), nn.Dropout(0.5), WindowMSA(), attention, nn.Linear(2, 2))


def rates(net: nn.Module) -> list[float]:
    return [net[0].drop_prob, net[1].p, net[2].attn_drop, net[3].dropout]


def test_off_turns_every_rate_off_and_counts_them() -> None:
    net = model()
    assert set_drop_rates_(net, 'off') == 4
    assert rates(net) == [0.0] * 4
    x = torch.randn(5, 2)
    assert torch.equal(net[1].train()(x), x)


def test_keep_changes_nothing() -> None:
    net = model()
    assert set_drop_rates_(net, 'keep') == 0
    assert rates(net) == [0.1, 0.5, 0.2, 0.3]


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"drop_rates='none'.*'keep', 'off'"):
        set_drop_rates_(model(), 'none')
