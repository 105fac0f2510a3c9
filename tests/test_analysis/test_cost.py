# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Bytes and bit operations against counts by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gplq_mm.analysis import MacCount, bit_operations, count_macs, model_bytes
from gplq_mm.convert import convert_, quantizers
from gplq_mm.ops import QuantMatMul
from gplq_mm.quantizers import FakeQuantizer, PerTensor, QuantSpec
from tests.helpers.mm_models import calibrate_weights

BATCH = 2
# (B, 4, 8, 8) -conv 3x3 stride 2, groups 2-> (B, 6, 4, 4) -deconv 2x2 stride 2-> (B, 5, 8, 8)
# -linear over channels-> (B, 64, 7), product with its transpose (B, 64, 64), float linear
CONV_MACS = BATCH * 6 * 4 * 4 * (2 * 9)
DECONV_MACS = BATCH * 6 * 4 * 4 * (5 * 4)
LINEAR_MACS = BATCH * 64 * 5 * 7
MATMUL_MACS = BATCH * 64 * 64 * 7
FLOAT_MACS = BATCH * 64 * 64 * 3
QUANTIZED_MACS = CONV_MACS + DECONV_MACS + LINEAR_MACS + MATMUL_MACS
WEIGHTS = {'conv': 6 * 2 * 9, 'deconv': 6 * 5 * 4, 'linear': 7 * 5}
OUTPUTS = {'conv': 6, 'deconv': 5, 'linear': 7}
BIASES = 6 + 5 + 7
FLOAT_NUMBERS = 64 * 3 + 3
MASK_BYTES = 11
SCALE_BYTES = (4 + 1) * (4 + 6 + 5 + 1 + 1)
"""Scale and zero point of every input channel and of the product's operands."""


class Net(nn.Module):
    """One layer of each kind, a matrix product, a float layer and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, 2, 1, groups=2)
        self.deconv = nn.ConvTranspose2d(6, 5, 2, 2)
        self.linear = nn.Linear(5, 7)
        self.head = nn.Linear(64, 3)
        self.register_buffer('mask', torch.zeros(MASK_BYTES, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.deconv(self.conv(x)).flatten(2).transpose(1, 2)
        x = self.linear(x)
        return self.head(self.matmul(x, x.transpose(1, 2)))


@pytest.fixture
def net() -> Net:
    net = Net()
    rules = [dict(name='deconv', num_bits=8), dict(name='head', enabled=False)]
    recipe: dict[str, Any] = dict(base='w4a4', rules=rules, weight=dict(num_bits=3))
    convert_(net, {**recipe, 'scope': ['conv', 'deconv', 'linear', 'head']})
    specs = [QuantSpec(num_bits=b, granularity=PerTensor()) for b in (5, 6)]
    net.matmul = QuantMatMul(*(FakeQuantizer(spec) for spec in specs))
    return net.eval()


def count(net: Net) -> MacCount:
    return count_macs(net, lambda: net(torch.randn(BATCH, 4, 8, 8)))


def switch(net: Net, enabled: bool) -> None:
    for quantizer in quantizers(net).values():
        quantizer.enabled = enabled


def calibrate(net: Net) -> None:
    for quantizer in quantizers(net, 'activation').values():
        scale = torch.full_like(quantizer.scale, 0.1)
        quantizer.set_qparams(scale, torch.zeros_like(scale))


def float_bytes() -> int:
    return 4 * (sum(WEIGHTS.values()) + BIASES + FLOAT_NUMBERS) + MASK_BYTES


def test_before_calibration_everything_is_float(net: Net) -> None:
    assert model_bytes(net) == float_bytes()
    switch(net, False)
    found = count(net)
    assert found.total == QUANTIZED_MACS + FLOAT_MACS
    macs = dict(conv=CONV_MACS, deconv=DECONV_MACS, linear=LINEAR_MACS, matmul=MATMUL_MACS)
    assert found.layers == macs
    assert bit_operations(net, found) == 1024 * found.total


def test_after_stage_1_activations_are_quantized(net: Net) -> None:
    calibrate(net)
    layers = 4 * CONV_MACS + 8 * DECONV_MACS + 4 * LINEAR_MACS
    expected = 32 * layers + 30 * MATMUL_MACS + 1024 * FLOAT_MACS
    assert bit_operations(net, count(net)) == expected
    assert model_bytes(net) == float_bytes() + SCALE_BYTES


def test_after_stage_2_weights_are_packed(net: Net) -> None:
    calibrate(net)
    calibrate_weights(net)
    layers = 4 * 3 * CONV_MACS + 8 * 8 * DECONV_MACS + 4 * 3 * LINEAR_MACS
    expected = layers + 30 * MATMUL_MACS + 1024 * FLOAT_MACS
    assert bit_operations(net, count(net)) == expected
    bits = {'conv': 3, 'deconv': 8, 'linear': 3}
    packed = sum(-(-WEIGHTS[n] * bits[n] // 8) + 4 * OUTPUTS[n] for n in bits)
    rest = 4 * (BIASES + FLOAT_NUMBERS) + MASK_BYTES
    assert model_bytes(net) == packed + rest + SCALE_BYTES


def test_counting_leaves_no_hooks(net: Net) -> None:
    switch(net, False)
    count(net)
    assert not any(m._forward_hooks for m in net.modules())
    with pytest.raises(KeyError):
        count_macs(net, lambda: {}['x'])
    assert not any(m._forward_hooks for m in net.modules())


def test_a_compensation_counts_once_it_is_fitted() -> None:
    from gplq_mm.ptq.corrections.side_branch import attach_compensation, compensated_blocks
    from tests.helpers.mm_models import classifier

    model = classifier('vit')
    convert_(model, dict(scope='all'))
    before = model_bytes(model)
    attach_compensation(model)
    assert model_bytes(model) == before
    block = next(iter(compensated_blocks(model).values()))
    block.compensation.set_values(torch.eye(16), torch.zeros(16))
    assert model_bytes(model) == before + 4 * (16 * 16 + 16) + 1
