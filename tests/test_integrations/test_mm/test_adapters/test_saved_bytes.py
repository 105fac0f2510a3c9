# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What a stack of ViT blocks saves for the backward pass, against float training."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip('mmpretrain')

from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer

from gplq_mm.ops import set_engine
from tests.helpers.engines import assert_engines_agree, converted
from tests.helpers.saved import saved_bytes

TOKENS, DIMS = 197, 192
RECOMPUTE = dict(type='fused', ffn='recompute')


def run(module, x):
    return module(x)


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(TransformerEncoderLayer(DIMS, 3, 4 * DIMS) for _ in range(2)))


def saved(module: nn.Module, batch: int, tokens: int = TOKENS) -> int:
    x = torch.randn(batch, tokens, DIMS, requires_grad=True)
    return saved_bytes(module, lambda: module(x))


def test_block_stack_and_its_growth() -> None:
    float_blocks = blocks()
    quantized = converted(copy.deepcopy(float_blocks), torch.randn(1, TOKENS, DIMS), run)
    base = saved(float_blocks, 2)
    assert base / 2 / 2 / 2**20 == pytest.approx(2.31, abs=0.01)  # MiB a block and image
    for engine, limit in (('fused', 0.55), (RECOMPUTE, 0.25)):
        set_engine(quantized, engine)
        found = {n: saved(quantized, n) for n in (1, 2, 3)}
        assert found[2] / base <= limit
        assert found[3] - found[2] == found[2] - found[1]  # linear in the batch
        assert saved(quantized, 1, 2 * TOKENS) <= 2 * found[1]  # and in the tokens


def test_eight_bits_save_less_than_float() -> None:
    float_blocks = blocks()
    quantized = converted(copy.deepcopy(float_blocks), torch.randn(1, 50, DIMS), run, 'w8a8')
    set_engine(quantized, RECOMPUTE)
    assert saved(quantized, 1) / saved(float_blocks, 1) < 0.3


@pytest.mark.parametrize('tokens', [1, 31])
@pytest.mark.parametrize('engine', ['fused', RECOMPUTE])
def test_odd_numbers_of_tokens(engine, tokens) -> None:
    x = torch.randn(3, tokens, DIMS)
    module = converted(blocks()[:1], x, run)
    assert_engines_agree(module, x, run, engine)


@pytest.mark.parametrize('reentrant', [False, True])
def test_activation_checkpointing_changes_nothing(reentrant) -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(2, 9, DIMS)
    module = converted(blocks()[:1], x, run)
    set_engine(module, 'fused')
    found = []
    for call in (module, lambda x: checkpoint(module, x, use_reentrant=reentrant)):
        module.zero_grad()
        inputs = x.clone().requires_grad_()
        call(inputs).square().sum().backward()
        found.append([inputs.grad, *(p.grad.clone() for p in module.parameters())])
    assert all(map(torch.equal, *found))
