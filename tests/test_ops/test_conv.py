# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers.layers import quantized, set_enabled, step
from tests.helpers.reference import SCHEMES, centred, rescale

CHANNELS = {1: (3, 5), 2: (4, 6), 3: (3, 9), 4: (4, 4)}
"""In and out channels by groups; 4 is depthwise."""


def pairs(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def conv_sum(x, weight, layer):
    """Convolution of int64 codes, one kernel position at a time."""
    (ph, pw), (sh, sw), (dh, dw) = map(pairs, (layer.padding, layer.stride, layer.dilation))
    x = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    kh, kw = weight.shape[2:]
    height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    inputs, filters = np.split(x, layer.groups, 1), np.split(weight, layer.groups, 0)
    outputs = []
    for part, kernel in zip(inputs, filters, strict=True):
        total = np.zeros((x.shape[0], kernel.shape[0], height, width), np.int64)
        for i in range(kh):
            for j in range(kw):
                rows = slice(i * dh, i * dh + (height - 1) * sh + 1, sh)
                cols = slice(j * dw, j * dw + (width - 1) * sw + 1, sw)
                total += np.einsum('bchw,oc->bohw', part[:, :, rows, cols], kernel[:, :, i, j])
        outputs.append(total)
    return np.concatenate(outputs, 1)


def transposed_sum(x, weight, layer):
    """Transposed convolution of int64 codes: every input scatters a kernel."""
    (ph, pw), (sh, sw), (dh, dw) = map(pairs, (layer.padding, layer.stride, layer.dilation))
    extra_h, extra_w = pairs(layer.output_padding)
    kh, kw = weight.shape[2:]
    full_h = (x.shape[2] - 1) * sh + dh * (kh - 1) + 1
    full_w = (x.shape[3] - 1) * sw + dw * (kw - 1) + 1
    inputs, filters = np.split(x, layer.groups, 1), np.split(weight, layer.groups, 0)
    outputs = []
    for part, kernel in zip(inputs, filters, strict=True):
        total = np.zeros(
            (x.shape[0], kernel.shape[1], full_h + extra_h, full_w + extra_w), np.int64
        )
        for i in range(kh):
            for j in range(kw):
                rows = slice(i * dh, i * dh + (x.shape[2] - 1) * sh + 1, sh)
                cols = slice(j * dw, j * dw + (x.shape[3] - 1) * sw + 1, sw)
                total[:, :, rows, cols] += np.einsum('bchw,co->bohw', part, kernel[:, :, i, j])
        outputs.append(total[:, :, ph : full_h + extra_h - ph, pw : full_w + extra_w - pw])
    return np.concatenate(outputs, 1)


def reference(layer, x):
    weight = centred(layer.weight_quantizer, layer.folded_weight())
    transposed = isinstance(layer, nn.ConvTranspose2d)
    total = (transposed_sum if transposed else conv_sum)(
        centred(layer.input_quantizer, x), weight, layer
    )
    factor = layer.weight_quantizer.scale.reshape(-1)
    if not layer.folds_input_scale:
        factor = factor * layer.input_quantizer.scale
    if transposed and len(factor) > 1:  # groups share the scales of their filters
        factor = torch.cat([factor] * layer.groups)
    bias = None if layer.bias is None else layer.bias.detach().numpy()[:, None, None]
    return rescale(total, factor.detach().numpy()[:, None, None], bias)


COMMON = {
    'bits': st.tuples(st.integers(2, 8), st.integers(2, 8)),
    'scheme': st.sampled_from(SCHEMES),
    'per_channel': st.tuples(st.booleans(), st.booleans()),
    'groups': st.sampled_from([1, 2, 3, 4]),
    'kernel': st.sampled_from([1, 2, 3, (1, 3)]),
    'stride': st.sampled_from([1, 2, (2, 1)]),
    'padding': st.sampled_from([0, 1, (0, 1)]),
    'dilation': st.sampled_from([1, 2]),
    'bias': st.booleans(),
    'size': st.sampled_from([(1, 7, 11), (2, 5, 8), (0, 6, 5)]),
    'seed': st.integers(0, 10**6),
}


def check(cls, bits, scheme, per_channel, groups, bias, size, seed, **geometry):
    torch.manual_seed(seed)
    channels = CHANNELS[groups]
    layer = cls(*channels, groups=groups, bias=bias, **geometry)
    spread = (torch.rand(channels[0]) * 5)[:, None, None]
    layer = quantized(layer, torch.randn(3, channels[0], 4, 4) * spread, bits, scheme, *per_channel)
    x = torch.randn(size[0], channels[0], *size[1:]) * spread * 1.3
    with torch.no_grad():
        integer = layer(x)
        assert torch.equal(integer, reference(layer, x))
    values = layer(x).detach()
    assert torch.allclose(values, integer, rtol=1e-5, atol=1e-5 * float(spread.max()))


@settings(max_examples=100)
@given(**COMMON)
def test_convolution_is_the_integer_reference_bit_for_bit(
    bits, scheme, per_channel, groups, kernel, stride, padding, dilation, bias, size, seed
):
    check(
        nn.Conv2d,
        bits,
        scheme,
        per_channel,
        groups,
        bias,
        size,
        seed,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
    )


@settings(max_examples=100)
@given(**COMMON, output_padding=st.sampled_from([0, 1]))
def test_transposed_convolution_is_the_integer_reference_bit_for_bit(
    bits,
    scheme,
    per_channel,
    groups,
    kernel,
    stride,
    padding,
    dilation,
    bias,
    size,
    seed,
    output_padding,
):
    assume(output_padding < max(dilation, min(pairs(stride))))
    check(
        nn.ConvTranspose2d,
        bits,
        scheme,
        per_channel,
        groups,
        bias,
        size,
        seed,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        output_padding=output_padding,
    )


def layers():
    return {
        'conv': nn.Conv2d(4, 6, 3, padding=1, groups=2),
        'patch embedding': nn.Conv2d(4, 6, 2, stride=2),
        'transposed': nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
    }


@pytest.mark.parametrize('name', layers())
@pytest.mark.parametrize('per_channel', [False, True])
def test_switched_off_it_is_the_float_layer_bit_for_bit(name, per_channel):
    x, layer = torch.randn(2, 4, 6, 6), layers()[name]
    twin = copy.deepcopy(layer)
    layer = quantized(layer, x, per_channel_input=per_channel, learn=True)
    set_enabled(layer, False)
    assert all(map(torch.equal, step(layer, x), step(twin, x)))
    with torch.no_grad():
        assert torch.equal(layer(x), twin(x))


@pytest.mark.parametrize('name', layers())
@pytest.mark.parametrize('per_channel', [False, True])
def test_a_map_without_a_batch_dimension(name, per_channel):
    x = torch.randn(2, 4, 6, 6)
    layer = quantized(layers()[name], x, per_channel_input=per_channel)
    with torch.no_grad():
        assert torch.equal(layer(x[1]), layer(x)[1])
    assert torch.allclose(layer(x[1]), layer(x)[1], atol=1e-6)


@pytest.mark.parametrize('name', layers())
def test_non_contiguous_input_and_written_weights(name):
    x = torch.randn(6, 4, 2, 6).permute(2, 1, 0, 3)
    layer = quantized(layers()[name], x, per_channel_input=True)
    with torch.no_grad():
        before = layer(x.contiguous())
        assert torch.equal(layer(x), before)
        layer.weight.copy_(layer.effective_weight())
        assert torch.equal(layer(x), before)
    assert torch.allclose(layer.unfolded_weight(layer.folded_weight()), layer.weight)


def test_a_large_batch_stays_exact():
    """Some float kernels transform their input first, which would round the sums."""
    x = torch.randn(17, 16, 24, 24)
    layer = quantized(nn.Conv2d(16, 16, 3, padding=1), x, (8, 8))
    with torch.no_grad():
        assert torch.equal(layer(x), reference(layer, x))


@pytest.mark.parametrize('mode', ['reflect', 'replicate', 'circular'])
def test_other_paddings_quantize_before_they_pad(mode):
    x = torch.randn(2, 3, 5, 5)
    layer = quantized(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), x)
    with torch.no_grad():
        integer = layer(x)
    assert torch.allclose(layer(x), integer, atol=1e-5)


def test_output_size_of_a_transposed_convolution():
    x = torch.randn(1, 3, 4, 4)
    layer = quantized(nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1), x)
    with torch.no_grad():
        assert layer(x, output_size=[8, 8]).shape[2:] == (8, 8)
        assert layer(x).shape[2:] == (7, 7)
