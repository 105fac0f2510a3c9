# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""``torch.compile`` traces quantized modules in one graph, with the reference's numbers."""

import pytest
import torch
from torch import nn

pytest.importorskip('mmpretrain')

from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer

from gplq_mm.ops import set_engine
from tests.helpers.attentions import ATTENTIONS, randomized
from tests.helpers.engines import Run, assert_close, converted, training_step


def run_compiled(run: Run) -> Run:
    def traced(module: nn.Module, x: torch.Tensor) -> object:
        torch._dynamo.reset()
        return torch.compile(run, backend='eager', fullgraph=True)(module, x)

    return traced


def plain(module: nn.Module, x: torch.Tensor) -> object:
    return module(x)


@pytest.mark.parametrize(
    'case', ['vit_block', 'window_mask', 'beit', 'sam_rel_pos', 'grouped', 'mvit_rel_pos', 'xca']
)
def test_one_graph_with_the_numbers_of_the_reference(case: str) -> None:
    torch.manual_seed(0)
    if case == 'vit_block':
        module: nn.Module = TransformerEncoderLayer(16, 2, 32)
        x, run = torch.randn(2, 5, 16), plain
    else:
        make, shape, extra = ATTENTIONS[case]
        module, x = make(), torch.randn(shape)
        run = lambda m, x: m(x, *extra)  # noqa: E731
    model = converted(randomized(module), x, run)
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    set_engine(model, 'fused')
    expected = training_step(model, 'reference', x, run)
    actual = training_step(model, 'fused', x, run_compiled(run))
    torch.testing.assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1], 'input')
    for name, grad in expected[2].items():
        assert_close(actual[2][name], grad, name)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(run_compiled(run)(model, x), run(model, x))
