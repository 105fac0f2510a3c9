# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy

import pytest
import torch
from torch import Tensor, nn

from gplq_mm.convert import convert_, quantized_layers, quantizers, set_quantization
from gplq_mm.ops import set_engine
from gplq_mm.ops.attention.multihead import QuantMultiheadAttention
from tests.helpers.engines import assert_close
from tests.helpers.engines import converted as converted_engine
from tests.helpers.reference import calibrated
from tests.helpers.saved import saved_bytes

B, L, S, E, HEADS = 2, 4, 5, 8, 2
OPTIONS = {
    'plain': {},
    'batch_first': dict(batch_first=True),
    'no_bias': dict(bias=False, batch_first=True),
    'own_widths': dict(kdim=6, vdim=7, batch_first=True),
    'extra_tokens': dict(add_bias_kv=True, add_zero_attn=True),
    'dropout': dict(dropout=0.3),
}
BOOL = torch.tensor([[False, True, False, False, True]] * L)
PADDING = torch.tensor([[False, False, True, True, False], [False] * 5])
MASKS: dict[str, dict] = {
    'none': {},
    'attn': dict(attn_mask=BOOL),
    'float': dict(attn_mask=BOOL * -3.0),
    'a_head': dict(attn_mask=torch.linspace(-2, 2, B * HEADS * L * S).view(B * HEADS, L, S)),
    'padding': dict(key_padding_mask=PADDING),
    'both': dict(attn_mask=BOOL, key_padding_mask=PADDING),
}


def attention(**options: object) -> nn.MultiheadAttention:
    torch.manual_seed(2)
    module = nn.MultiheadAttention(E, HEADS, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def operands(module: nn.MultiheadAttention) -> list[Tensor]:
    inputs = [torch.randn(B, L, E), torch.randn(B, S, module.kdim), torch.randn(B, S, module.vdim)]
    return inputs if module.batch_first else [x.transpose(0, 1) for x in inputs]


def converted(module: nn.MultiheadAttention) -> QuantMultiheadAttention:
    module = copy.deepcopy(module)
    convert_(module, dict(base='w8a8', scope='all'))
    assert isinstance(module, QuantMultiheadAttention)
    return module


def passing_through(module: QuantMultiheadAttention) -> QuantMultiheadAttention:
    """The quantized path runs, but no operand is rounded."""

    class Nothing:
        num_passes = 1

        def observe(self, x: Tensor) -> None:
            assert torch.isfinite(x).all()

    for quantizer in quantizers(module, 'activation').values():
        quantizer.observer = Nothing()
    return module


@pytest.mark.parametrize('need_weights', [True, False])
@pytest.mark.parametrize('masks', MASKS)
@pytest.mark.parametrize('options', OPTIONS)
def test_written_out_attention_is_torchs(options: str, masks: str, need_weights: bool) -> None:
    module = attention(**OPTIONS[options]).eval()
    quant = passing_through(converted(module))
    inputs = operands(module)
    options_ = dict(need_weights=need_weights, average_attn_weights=False, **MASKS[masks])
    expected, weights = module(*inputs, **options_)
    actual, quant_weights = quant(*inputs, **options_)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (quant_weights is None) == (weights is None)
    if weights is not None:
        torch.testing.assert_close(quant_weights, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('mode', [True, False])
@pytest.mark.parametrize('options', OPTIONS)
def test_off_is_torch_bit_for_bit(options: str, mode: bool) -> None:
    module = attention(**OPTIONS[options]).train(mode)
    quant = converted(module)
    set_quantization(quant, False)
    inputs = operands(module)
    for need_weights in (True, False):
        results = []
        for m in (module, quant):
            m.zero_grad()
            torch.manual_seed(0)
            out, _ = m(*inputs, need_weights=need_weights, key_padding_mask=PADDING)
            out.square().sum().backward()
            grads = [p.grad for n, p in m.named_parameters() if '_quantizer.' not in n]
            results.append([out, *grads])
        assert len(results[0]) == len(results[1])
        assert all(map(torch.equal, *results))
        with torch.no_grad():  # torch's fused path
            assert torch.equal(*(m.eval()(*inputs)[0] for m in (module, quant)))
        module.train(mode)
        quant.train(mode)


def test_unbatched_and_causal() -> None:
    module = attention().eval()
    quant = passing_through(converted(module))
    x = torch.randn(L, E)
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    expected = module(x, x, x, attn_mask=mask, is_causal=True)
    actual = quant(x, x, x, attn_mask=mask, is_causal=True)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match='attn_mask'):
        quant(x, x, x, is_causal=True)


def test_keys_and_layers() -> None:
    module = attention()
    quant = converted(module)
    added = set(quant.state_dict()) - set(module.state_dict())
    assert set(module.state_dict()) <= set(quant.state_dict())
    assert all('_quantizer.' in key for key in added)
    names = ['out_proj', 'in_proj_q', 'in_proj_k', 'in_proj_v']
    assert sorted(quantized_layers(quant)) == sorted(names)
    assert len({id(p) for p in quant.parameters()}) == len(list(quant.parameters()))


def test_weight_of_a_projection_is_a_view_and_can_be_exchanged() -> None:
    quant = converted(attention())
    layer = quant.in_proj_k
    view = layer.weight
    assert torch.equal(view, quant.in_proj_weight[E : 2 * E])
    with torch.no_grad():
        layer.weight.copy_(torch.ones(E, E))
    assert (quant.in_proj_weight[E : 2 * E] == 1).all()
    assert not (quant.in_proj_weight[:E] == 1).any()
    other = nn.Parameter(torch.zeros(E, E))
    layer.weight = other
    assert layer.weight is other
    assert (quant.in_proj_weight[E : 2 * E] == 1).all()
    layer.weight = view
    assert (layer.weight == 1).all()
    assert 'in_proj_k.weight' not in quant.state_dict()


def test_a_copy_projects_with_its_own_weight() -> None:
    quant = converted(attention())
    twin = copy.deepcopy(quant)
    with torch.no_grad():
        twin.in_proj_weight.zero_()
    assert (twin.in_proj_q.weight == 0).all()
    assert not (quant.in_proj_q.weight == 0).any()


def test_eight_bits_are_close_and_differ() -> None:
    module = attention().eval()
    quant = converted(module).eval()
    inputs = operands(module)
    passing_through(quant)
    seen: dict[str, list[Tensor]] = {}
    for name, q in quantizers(quant, 'activation').items():
        q.observer.observe = lambda x, name=name: seen.setdefault(name, []).append(x)
    with torch.no_grad():
        expected, _ = quant(*inputs)
    for name, q in quantizers(quant, 'activation').items():
        q.observer = None
        calibrated(q, seen[name][0])
    for layer in quantized_layers(quant).values():
        calibrated(layer.weight_quantizer, layer.folded_weight())
    with torch.no_grad():
        codes, _ = quant(*inputs)
    values, _ = quant(*inputs)
    torch.testing.assert_close(codes, values.detach(), rtol=1e-4, atol=1e-4)
    assert 0 < (codes - expected).abs().max() < 0.1 * expected.abs().max()


def trained_step(
    module: nn.Module, engine: str, need_weights: bool, masks: dict
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the parameters of a copy of ``module``."""
    module = copy.deepcopy(module)
    set_engine(module, engine)
    torch.manual_seed(3)
    out, _ = module(*operands(module), need_weights=need_weights, **masks)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return out, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def fused(**options: object) -> nn.Module:
    """Calibrated in 4 bits, in training mode."""

    def run(module: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return module(*operands(module))[0]

    return converted_engine(attention(**options), torch.empty(0), run)


@pytest.mark.parametrize('masks', MASKS)
@pytest.mark.parametrize('options', OPTIONS)
def test_without_weights_the_outputs_have_equal_bits(options: str, masks: str) -> None:
    module = fused(**OPTIONS[options])
    given = MASKS[masks]
    expected, grads = trained_step(module, 'fused', True, given)
    for engine in ('fused', 'reference'):
        out, found = trained_step(module, engine, False, given)
        assert torch.equal(out, expected)
        assert found.keys() == grads.keys()
        of_scales = [name for name in found if name.endswith('.scale')]
        for name in found.keys() - set(of_scales):
            assert_close(found[name], grads[name], name)
        one, two = (torch.cat([g[n].flatten() for n in of_scales]) for g in (found, grads))
        assert (one - two).norm() <= 0.02 * two.norm()  # residuals of codes have 8 bits
    with torch.no_grad():
        module.eval()
        inputs = operands(module)
        results = [module(*inputs, need_weights=need, **given)[0] for need in (True, False)]
        assert torch.equal(*results)


def test_without_weights_only_the_codes_of_q_k_and_v_are_saved() -> None:
    module, tokens = fused(batch_first=True), 64
    set_engine(module, 'fused')
    x = torch.randn(B, tokens, E)

    def saved(need_weights: bool) -> int:
        return saved_bytes(module, lambda: module(x, x, x, need_weights=need_weights)[0])

    probabilities = B * HEADS * tokens * tokens
    assert saved(True) > probabilities  # at least a byte each
    codes = 8 * B * tokens * E  # inputs of four layers, q, k, v: a byte each, and the output
    assert saved(False) < 1.5 * codes < probabilities


def test_a_learned_mask_gets_its_gradient() -> None:
    module = fused(batch_first=True)
    grads = []
    for need_weights in (True, False):
        mask = torch.zeros(L, S, requires_grad=True)
        torch.manual_seed(3)
        out, _ = module(*operands(module), need_weights=need_weights, attn_mask=mask)
        out.square().sum().backward()
        grads.append(mask.grad)
    assert grads[0].any()
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)
