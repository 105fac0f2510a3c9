# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch
from torch import nn

from gplq_mm.convert import attach_rel_pos_matmuls, convert_, register_handler, set_quantization
from gplq_mm.convert.handlers import HANDLERS
from gplq_mm.ops import QuantMatMul, swap_class
from gplq_mm.ops.attention.relative_position import (
    FloatRelPosMatMul,
    QuantRelPosMatMul,
    RelPosAttention,
    SharedQueryMatMul,
)
from gplq_mm.ops.float_matmul import FloatMatMul
from tests.helpers.calibration import calibrate_activations


class Attention(nn.Module):
    num_heads, scale, use_rel_pos = 2, 0.5, True

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.rel_pos_h = nn.Parameter(torch.randn(5, 4))
        self.rel_pos_w = nn.Parameter(torch.randn(5, 4))


class QuantAttention(RelPosAttention, Attention):
    pass


@pytest.fixture(autouse=True)
def handler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('gplq_mm.convert.handlers.HANDLERS', dict(HANDLERS))

    @register_handler(Attention)
    def convert(module: Attention, name: str, context: object) -> None:
        swap_class(module, QuantAttention)
        attach_rel_pos_matmuls(module, name, context)


def converted(*rules: dict) -> tuple[QuantAttention, list[str]]:
    torch.manual_seed(0)
    module = Attention()
    off = [dict(rule, enabled=False) for rule in rules]
    report = convert_(module, dict(base='w4a4', scope='all', rules=off))
    return module, [name for name, _ in report.kept_float]


def test_all_products_are_attached() -> None:
    module, kept = converted()
    assert kept == []
    assert type(module.qk_matmul) is SharedQueryMatMul
    assert type(module.pv_matmul) is QuantMatMul
    for matmul in (module.rel_h_matmul, module.rel_w_matmul):
        assert isinstance(matmul, QuantRelPosMatMul)
        assert matmul.lhs_quantizer is module.qk_matmul.lhs_quantizer
        assert 'lhs_quantizer' not in dict(matmul.named_children())  # one owner, one key


@pytest.mark.parametrize(
    ('rule', 'names'),
    [
        (dict(role='key'), ['qk_matmul', 'rel_h_matmul', 'rel_w_matmul']),
        (dict(role='rel_pos'), ['rel_h_matmul', 'rel_w_matmul']),
        (dict(role='value'), ['pv_matmul']),
    ],
)
def test_rules_leave_products_float(rule: dict, names: list[str]) -> None:
    module, kept = converted(rule)
    assert sorted(kept) == names
    for name in names:
        assert isinstance(getattr(module, name), FloatMatMul)
        assert isinstance(getattr(module, name), FloatRelPosMatMul) == name.startswith('rel')
    reference, _ = converted()
    x = torch.randn(2, 3, 3, 8)
    for m in (module, reference):
        set_quantization(m, False)
    assert torch.equal(module(x), reference(x))


@pytest.mark.parametrize('norm_first', [False, True])
def test_encoder_layer_of_torch_does_not_pass_its_quantizers_by(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, activation='gelu', batch_first=True, norm_first=norm_first
    ).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = layer(x)
        convert_(layer, dict(base='w8a8', scope='all'))
        assert layer.linear2.input_quantizer.role == 'post_gelu'
        calibrate_activations(layer, lambda: layer(x))
        error = (layer(x) - expected).norm()
    assert 0 < error < 0.05 * expected.norm()
