# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""RepQ, bias correction, QwT-v2 and QwT as an entry: what goes into weights and biases."""

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gplq_mm.calibration.activation_ranges import calibrate_activations
from gplq_mm.convert import convert_, quantized_layers, resolve_recipe, set_quantization
from gplq_mm.ptq.corrections.side_branch import compensated_blocks, detach_compensation
from gplq_mm.ptq.stage2 import prepare_stage2, run_stage2
from gplq_mm.ptq.weight_error import measure_weight_error
from tests.helpers.tiny_blocks import Block, BlockStack, images, run_pass, stage1_stack


def recipe_of(ptq: Any, **stage2: Any) -> Any:
    return resolve_recipe(dict(base='w2a2', scope='all', weight=dict(ptq=ptq), stage2=stage2))


def quantize(model: nn.Module, run: Any, ptq: Any) -> Any:
    return run_stage2(model, recipe_of(ptq), run)


def uneven_stack(bits: int = 3) -> tuple[nn.Module, Any]:
    """A model whose LayerNorm channels differ in range by a factor of a hundred."""
    torch.manual_seed(0)
    original, Block.__init__ = Block.__init__, _uneven(Block.__init__)
    try:
        return stage1_stack(bits, activation=dict(granularity='per_tensor'))
    finally:
        Block.__init__ = original


def _uneven(init: Any) -> Any:
    def build(self: Block, width: int) -> None:
        init(self, width)
        for norm in (self.ln1, self.ln2):
            with torch.no_grad():
                norm.weight.copy_(torch.logspace(-1, 1, width))
                norm.bias.normal_()

    return build


def float_output(model: nn.Module) -> Tensor:
    set_quantization(model, False)
    with torch.no_grad():
        out = model(images(4, seed=5).flatten(0, 1))
    set_quantization(model, True)
    return out


def quantized_output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(images(16, seed=5).flatten(0, 1))


def reparameterize(model: nn.Module, run: Any) -> Any:
    """RepQ alone, the weights left float."""
    from gplq_mm.calibration.float_weights import copy_biases, copy_vectors, copy_weights
    from gplq_mm.ptq import WEIGHT_PTQ, PTQTask

    layers = quantized_layers(model)
    weights, biases, norms = copy_weights(layers), copy_biases(layers), copy_vectors(model)
    task = PTQTask(model, layers, weights, run, None, biases, norms)
    WEIGHT_PTQ['repq']().apply(task)
    return task


def test_repq_leaves_the_float_function_unchanged_and_lowers_the_quantization_error() -> None:
    model, run = uneven_stack()
    wanted = float_output(model)
    before = (quantized_output(model) - float_output_of(model, 16)).square().mean()
    norms = [block.ln2.weight.detach().clone() for block in model.layers]
    task = reparameterize(model, run)
    torch.testing.assert_close(float_output(model), wanted, rtol=1e-4, atol=1e-5)
    assert any(
        not torch.equal(block.ln2.weight, norm)
        for block, norm in zip(model.layers, norms, strict=True)
    )
    after = (quantized_output(model) - float_output_of(model, 16)).square().mean()
    assert after < before
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.weight, task.float_weights[name])


def float_output_of(model: nn.Module, count: int) -> Tensor:
    set_quantization(model, False)
    with torch.no_grad():
        out = model(images(count, seed=5).flatten(0, 1))
    set_quantization(model, True)
    return out


def test_repq_leaves_a_norm_with_other_readers_alone() -> None:
    class Reader(Block):
        def forward(self, x: Tensor, hw_shape: Any = None) -> Tensor:
            x = x + self.attn(self.ln1(x))
            y = self.ln2(x)
            return y + self.ffn(y)  # the residual reads the norm too

    model, run = uneven_stack()
    model.layers[0].__class__ = Reader
    wanted, norm = float_output(model), model.layers[0].ln2.weight.detach().clone()
    task = reparameterize(model, run)
    torch.testing.assert_close(float_output(model), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.layers[0].ln2.weight, norm)
    assert task.notes == ['layers.0: a LayerNorm has consumers besides linear layers; not changed']


@pytest.mark.parametrize(
    ('ptq', 'message'),
    [
        (['mse', 'repq'], 'repq changes float weights; put it before mse'),
        (['qwt', 'gptq'], 'qwt corrects quantized weights; put it after gptq'),
        ('repq', "none of these rounds weights; write ['repq', 'gptq']"),
        ('bias_correction', "none of these rounds weights; write ['gptq', 'bias_correction']"),
        (['repq', 'qwt_v2'], "write ['repq', 'gptq', 'qwt_v2']"),
        (['global', 'mse'], 'global corrects quantized weights; put it after mse'),
    ],
)
def test_an_order_that_cannot_work_is_refused_before_stage_1(ptq: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare_stage2(BlockStack(), recipe_of(ptq))


def layer_outputs(model: nn.Module, name: str) -> Tensor:
    """Outputs of a layer over the calibration images, ``(tokens, channels)``."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        for image in images():
            model(image)
    handle.remove()
    return torch.cat([s.flatten(0, -2) for s in seen]).double()


@pytest.mark.parametrize('name', ['stem', 'layers.1.ffn.2', 'head'])
def test_bias_correction_restores_every_mean(name: str) -> None:
    model, run = stage1_stack(2)
    wanted = layer_outputs(model, name).mean(0)
    quantize(model, run, ['mse', 'bias_correction'])
    got = layer_outputs(model, name).mean(0)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_qwt_v2_is_the_least_squares_line_of_each_channel() -> None:
    plain, run = stage1_stack(2)
    wanted = layer_outputs(plain, 'stem').numpy()
    model, run_again = stage1_stack(2)
    quantize(plain, run, 'mse')
    rounded = layer_outputs(plain, 'stem').numpy()
    quantize(model, run_again, ['mse', dict(type='qwt_v2', largest=100.0)])
    got = layer_outputs(model, 'stem').numpy()
    for channel in range(wanted.shape[1]):
        line = np.polyfit(rounded[:, channel], wanted[:, channel], 1)
        np.testing.assert_allclose(
            got[:, channel], np.polyval(line, rounded[:, channel]), atol=1e-5
        )
    ours, theirs = (
        m.stem.weight_quantizer.codes(m.stem.weight)[0].detach() for m in (model, plain)
    )
    assert torch.equal(ours, theirs)  # the integers of the product are the same
    assert not torch.equal(model.stem.weight_quantizer.scale, plain.stem.weight_quantizer.scale)


def test_layers_without_bias_are_named_or_scaled_only() -> None:
    for ptq, notes in (('bias_correction', ['head: has no bias to correct']), ('qwt_v2', [])):
        model, run = stage1_stack(2)
        model.head.bias = None
        wanted = layer_outputs(model, 'head')
        plain = copy.deepcopy(model)
        result = quantize(model, run, ['mse', ptq])
        assert result.notes == notes
        assert model.head.bias is None and model.head.weight.isfinite().all()
        del plain, wanted


def test_qwt_as_an_entry_is_the_compensation_of_the_recipe() -> None:
    entry, run = stage1_stack(2, data=images(24))
    assert prepare_stage2(entry, recipe_of(['percentile', 'qwt'])) == ['layers.0', 'layers.1']
    result = run_stage2(entry, recipe_of(['percentile', 'qwt']), run)
    section, run_section = stage1_stack(2, data=images(24))
    run_stage2(section, recipe_of('percentile', compensation='qwt'), run_section)
    states = entry.state_dict(), section.state_dict()
    assert [n for n in states[1] if not torch.equal(states[0][n], states[1][n])] == []
    assert result.side_params == 2 * (36 + 6) and result.side_flops > 0
    detach_compensation(entry)
    assert not compensated_blocks(entry)
    assert type(entry.layers[0]) is Block and isinstance(entry, BlockStack)
    assert not any('compensation' in name for name in entry.state_dict())


def test_reference_of_a_combination_has_the_stage_1_biases() -> None:
    """Running the same correction twice changes nothing the second time."""
    states = []
    for ptq in (['mse', 'bias_correction'], ['mse', 'bias_correction', 'bias_correction']):
        model, run = stage1_stack(2)
        quantize(model, run, ptq)
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], atol=1e-5, rtol=1e-4)


def test_reference_after_global_has_the_stage_1_normalizations() -> None:
    """`global` trains LayerNorms; bias correction after it still restores stage 1's means."""
    stage1, run = stage1_stack(2)
    wanted = {n: layer_outputs(stage1, n).mean(0) for n in ('layers.0.ffn.0', 'head')}
    quantize(stage1, run, ['mse', dict(type='global', steps=10, lr=0.05), 'bias_correction'])
    assert not torch.equal(stage1.layers[0].ln2.weight, torch.ones(6))
    for name, mean in wanted.items():
        np.testing.assert_allclose(layer_outputs(stage1, name).mean(0), mean, atol=1e-5)


def test_weight_error_after_repq_is_that_of_the_columns_as_they_were() -> None:
    model, run = uneven_stack()
    before = {n: la.weight.detach().clone() for n, la in quantized_layers(model).items()}
    task = reparameterize(model, run)
    name, factor = next(iter(task.input_factors.items()))
    assert factor.max() > 2 * factor.min()
    torch.testing.assert_close(task.float_weights[name].detach(), before[name] * factor)
    layer = model.get_submodule(name)
    with torch.no_grad():
        layer.weight.add_(0.1 * factor)  # the same error in all columns, as they were
    error = measure_weight_error(layer, task.float_weights[name], factor)
    assert error.weight_mse == pytest.approx(0.01, rel=1e-4)


class OutsideBias(nn.Module):
    """A layer whose bias its caller hands over, as in BEiT."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 6, bias=False)
        self.outside = nn.Parameter(torch.linspace(-4, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv.linear(x, self.outside) if hasattr(self.qkv, 'linear') else self.qkv(x)


def test_qwt_v2_does_not_fit_a_bias_that_it_cannot_change() -> None:
    losses = []
    for ptq in ('mse', ['mse', dict(type='qwt_v2', largest=100.0)]):
        torch.manual_seed(0)
        model = OutsideBias().eval()
        convert_(model, dict(base='w2a2', scope='all'))
        data = images()
        run = run_pass(model, data)
        calibrate_activations(model, run)
        wanted = layer_outputs(model, 'qkv')
        quantize(model, run, ptq)
        losses.append((layer_outputs(model, 'qkv') - wanted).square().mean(0))
    plain, fitted = losses
    assert (fitted <= plain * (1 + 1e-6)).all() and (fitted < 0.99 * plain).any()
