# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Which weights train: scales always, the others as the recipe says."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from gplq_mm.calibration.activation_ranges import calibrate_activations
from gplq_mm.convert import convert_, quantizers
from gplq_mm.distillation.trainable import choose_trained_


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj((q @ k.mT).softmax(-1) @ v)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.ffn = nn.LayerNorm(8), Attention(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.ffn(x)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    convert_(model, dict(scope='all'))
    return model


def trained(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def scales(model: nn.Module) -> set[str]:
    return {f'{n}.scale' for n in quantizers(model, 'activation')}


@pytest.mark.parametrize(
    ('train', 'pattern'),
    [
        ('all', r'.*'),
        ('attention', r'\d\.attn\.(qkv|proj)\.(weight|bias)'),
        ('projection', r'\d\.attn\.proj\.(weight|bias)'),
        ('vectors', r'.*(norm\.weight|bias)'),
        ('none', r'nothing'),
        (['*.norm.*', '1.ffn.weight'], r'\d\.norm\..*|1\.ffn\.weight'),
    ],
)
def test_scales_train_always_weights_as_asked(model: nn.Module, train: Any, pattern: str) -> None:
    weights = {n for n, _ in model.named_parameters()} - scales(model)
    expected = {n for n in weights if re.fullmatch(pattern, n)}
    assert set(choose_trained_(model, train)) == expected
    assert trained(model) == expected | scales(model)


def test_frozen_weights_get_no_gradient(model: nn.Module) -> None:
    x = torch.randn(2, 5, 8)
    calibrate_activations(model, lambda: model(x))
    choose_trained_(model, 'projection')
    model(x).square().sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == trained(model)
    assert model[0].attn.proj.weight.grad.abs().sum() > 0


def test_what_the_model_froze_stays_frozen(model: nn.Module) -> None:
    model[0].requires_grad_(False)
    choose_trained_(model, 'attention')
    assert {n.split('.')[0] for n in trained(model)} == {'1'}


@pytest.mark.parametrize(
    ('train', 'message'),
    [
        ('attn', r"train='attn': write one of .*'projection'"),
        ([1], r'write one of'),
        (['*.atn.*'], r"'\*\.atn\.\*' matches no weight; there are, for example, "),
    ],
)
def test_what_matches_nothing_is_an_error(model: nn.Module, train: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_trained_(model, train)


def test_a_model_without_attention_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    convert_(model, dict(scope='all'))
    with pytest.raises(ValueError, match=r"'projection' matches no weight.*no module named attn"):
        choose_trained_(model, 'projection')
