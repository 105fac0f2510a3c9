# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy

import pytest
import torch
from torch import nn

from gplq_mm.calibration.float_weights import copy_weights, float_weights
from gplq_mm.convert import quantized_layers
from gplq_mm.ptq import PTQTask, build_weight_ptq
from gplq_mm.ptq.corrections.qwt import QwT
from gplq_mm.ptq.corrections.side_branch import (
    CompensatedBlock,
    attach_compensation,
    compensated_blocks,
    compensation_cost,
    compensation_off,
)
from gplq_mm.stream.blocks import block_width, find_blocks
from tests.helpers.tiny_blocks import WIDTH, Block, BlockStack, images, run_pass, stage1_stack


def quantized_stack(bits=3, data=None):
    """Stage-1 copy, the same model with quantized weights, its layers and float weights."""
    model, run = stage1_stack(bits, data=data)
    stage1 = copy.deepcopy(model)
    attach_compensation(model)
    layers = quantized_layers(model)
    weights = copy_weights(layers)
    build_weight_ptq('minmax')[0].apply(PTQTask(model, layers, weights))
    return stage1, model, layers, weights, run


@torch.no_grad()
def block_calls(model, data, index):
    """Inputs and outputs of one block over all images, ``(tokens, C)`` each."""
    calls = []
    handle = model.layers[index].register_forward_hook(
        lambda _, args, out: calls.append((args[0], out))
    )
    for image in data:
        model(image)
    handle.remove()
    return tuple(torch.cat([c[i].reshape(-1, WIDTH) for c in calls]).double() for i in range(2))


def ridge_oracle(x, residual, ridge):
    """Ridge with a free bias as one stacked least-squares problem."""
    centred = x - x.mean(0)
    penalty = ridge * centred.square().sum() / WIDTH
    stacked = torch.cat([x, x.new_ones(len(x), 1)], 1)
    rows = torch.cat([penalty.sqrt() * torch.eye(WIDTH), torch.zeros(WIDTH, 1)], 1).double()
    solution = torch.linalg.lstsq(
        torch.cat([stacked, rows]), torch.cat([residual, x.new_zeros(WIDTH, WIDTH)])
    ).solution
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize('ridge', [0.0, 1e-3, 1.0])
def test_values_are_the_ridge_solution_block_by_block(ridge):
    data = images(24)
    stage1, model, layers, weights, run = quantized_stack(bits=2, data=data)
    results = QwT(model, layers, weights, ridge=ridge).fit(run)
    branches = [b.compensation for b in model.layers]
    for index, branch in enumerate(branches):
        values = branch.weight.clone(), branch.bias.clone()
        later = branches[index:]
        for other in later:
            other.enabled = False
        x, y_z = block_calls(model, data, index)
        for other in later:
            other.enabled = True
        _, y = block_calls(stage1, data, index)
        weight, bias = ridge_oracle(x, y - y_z, ridge)
        result = results[f'layers.{index}']
        assert result.fitted
        torch.testing.assert_close(values[0].double(), weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(values[1].double(), bias, rtol=1e-4, atol=1e-6)
        assert result.mse_before == pytest.approx(float((y - y_z).square().mean()), rel=1e-9)
        left = y - y_z - x @ weight.T - bias
        assert result.mse_after == pytest.approx(float(left.square().mean()), rel=1e-5)
        assert result.tokens_per_image == 9


def test_block_target_is_the_float_block_on_the_same_input():
    data = images(24)
    _, model, layers, weights, run = quantized_stack(bits=2, data=data)
    results = QwT(model, layers, weights, ridge=0.0, target='block').fit(run)
    model.layers[1].compensation.enabled = False
    x, y_z = block_calls(model, data, 1)
    with torch.no_grad(), float_weights(layers, weights):
        y = model.layers[1](x.float().view(24, 9, WIDTH)).view(-1, WIDTH).double()
    assert results['layers.1'].mse_before == pytest.approx(
        float((y - y_z).square().mean()), rel=1e-6
    )
    weight, _ = ridge_oracle(x, y - y_z, 0.0)
    torch.testing.assert_close(
        model.layers[1].compensation.weight.double(), weight, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_block_error_never_grows(bits):
    data = images(24)
    stage1, model, layers, weights, run = quantized_stack(bits, data)
    results = QwT(model, layers, weights).fit(run)
    for index, result in enumerate(results.values()):
        assert result.mse_after <= result.mse_before
        _, y = block_calls(stage1, data, index)
        _, compensated = block_calls(model, data, index)
        measured = float((y - compensated).square().mean())
        assert measured == pytest.approx(result.mse_after, rel=1e-3)


def test_attached_but_unfitted_is_the_identity():
    model, _ = stage1_stack()
    plain = copy.deepcopy(model)
    assert attach_compensation(model) == ['layers.0', 'layers.1']
    x = images(1)[0]
    assert torch.equal(model(x), plain(x))
    block = model.layers[0]
    assert isinstance(block, CompensatedBlock) and isinstance(block, Block)
    assert type(block) is type(model.layers[1])
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in plain.named_parameters()}
    grads = [torch.autograd.grad(m(x).sum(), m.stem.weight)[0] for m in (model, plain)]
    assert torch.equal(*grads)
    assert compensation_cost(model) == {'side_params': 0, 'side_macs_per_token': 0}


def test_attaching_twice_keeps_the_branch():
    model, _ = stage1_stack()
    attach_compensation(model)
    branch = model.layers[0].compensation
    attach_compensation(model)
    assert model.layers[0].compensation is branch
    assert type(model.layers[0]).__name__ == 'CompensatedBlock'


def test_checkpoint_brings_the_branch_back():
    _, model, layers, weights, run = quantized_stack()
    QwT(model, layers, weights).fit(run)
    fresh, _ = stage1_stack(seed=7)
    attach_compensation(fresh)
    fresh.load_state_dict(model.state_dict())
    x = images(1, seed=5)[0]
    assert torch.equal(fresh(x), model(x))
    with compensation_off(fresh):
        assert not torch.equal(fresh(x), model(x))
    assert compensation_cost(fresh) == {'side_params': 2 * (36 + 6), 'side_macs_per_token': 72}
    assert torch.equal(copy.deepcopy(fresh)(x), model(x))


@pytest.mark.parametrize('ridge', [0.0, 1e-4])
def test_singular_inputs_have_an_answer(ridge):
    data = images(1)[:, :, :1].expand(6, 1, 1, 8)  # one token over and over
    _, model, layers, weights, run = quantized_stack(bits=2, data=data)
    results = QwT(model, layers, weights, ridge=ridge).fit(run)
    for name, block in compensated_blocks(model).items():
        assert block.compensation.weight.isfinite().all()
        assert results[name].mse_after <= results[name].mse_before
        assert results[name].mse_after < 1e-10  # a bias alone corrects one token


def test_directions_that_do_not_vary_get_no_weight():
    data = images(24)
    data[..., 3:] = 0  # tokens of 6 channels in a space of 3 dimensions
    _, model, layers, weights, run = quantized_stack(bits=2, data=data)
    QwT(model, layers, weights, ridge=0.0).fit(run)
    model.layers[0].compensation.enabled = False
    x, _ = block_calls(model, data, 0)
    weight = model.layers[0].compensation.weight.double()
    assert weight.abs().max() < 10
    null = torch.linalg.svd(x - x.mean(0)).Vh[3:]  # (3, C)
    assert (null @ weight.T).abs().max() < 1e-5


def test_too_few_tokens_are_not_trusted():
    data = images(1)[:, :, :5]  # 5 tokens, 7 unknowns a channel: any residual can be fitted
    _, model, layers, weights, run = quantized_stack(bits=2, data=data)
    results = QwT(model, layers, weights, ridge=0.0).fit(run)
    assert not any(r.fitted for r in results.values())
    assert compensation_cost(model)['side_params'] == 0


def test_order_and_split_of_the_images_do_not_matter():
    data = images(12)
    values = []
    for order in (torch.arange(12), torch.arange(11, -1, -1)):
        _, model, layers, weights, _ = quantized_stack(bits=2, data=data)
        QwT(model, layers, weights).fit(run_pass(model, data[order]))
        values.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(v.values() for v in values), strict=True))
    _, model, layers, weights, _ = quantized_stack(bits=2, data=data)
    batched = data.view(3, 4, 9, 8)
    QwT(model, layers, weights).fit(run_pass(model, batched))
    torch.testing.assert_close(
        model.layers[1].compensation.weight, values[0]['layers.1.compensation.weight']
    )


def test_model_is_left_as_it_was():
    _, model, layers, weights, run = quantized_stack()
    before = {n: layer.weight for n, layer in layers.items()}
    QwT(model, layers, weights).fit(run)
    assert all(layer.weight is before[n] for n, layer in layers.items())
    assert all(layer.weight_quantizer.enabled for layer in layers.values())
    assert 'forward' not in vars(model)
    assert not model.layers[0]._forward_hooks


def test_nan_is_reported_with_the_block():
    _, model, layers, weights, _ = quantized_stack()
    bad = images(2)
    bad[1, 0, 0] = float('nan')
    with pytest.raises(ValueError, match=r'layers\.0: NaN or infinity'):
        QwT(model, layers, weights).fit(run_pass(model, bad))
    assert 'forward' not in vars(model)


def test_empty_pass_is_an_error():
    _, model, layers, weights, _ = quantized_stack()
    with pytest.raises(ValueError, match='no block was reached'):
        QwT(model, layers, weights).fit(lambda: None)


@pytest.mark.parametrize('options', [dict(ridge=-1.0), dict(target='fp32')])
def test_wrong_options_are_refused(options):
    _, model, layers, weights, _ = quantized_stack()
    with pytest.raises(ValueError, match='write a ridge'):
        QwT(model, layers, weights, **options)


def test_blocks_by_pattern():
    model, _ = stage1_stack()
    assert list(find_blocks(model, ['*.1'])) == ['layers.1']
    with pytest.raises(ValueError, match=r"'stages\.\*' matches none of the blocks \['layers"):
        find_blocks(model, ['*.1', 'stages.*'])


def test_float_models_have_no_blocks_to_compensate():
    with pytest.raises(ValueError, match='no quantized transformer block'):
        find_blocks(BlockStack())


def test_width_needs_a_norm_or_embed_dims():
    block = Block(8)
    assert block_width(block) == 8
    del block.ln1, block.ln2
    with pytest.raises(ValueError, match='Block: .*it has no LayerNorm'):
        block_width(block)
    block.embed_dims = 8
    assert block_width(block) == 8
    assert block_width(nn.Sequential(nn.Identity(), nn.LayerNorm([3, 5]))) == 5
