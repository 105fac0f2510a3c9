# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
from torch import nn

from gplq_mm.convert import convert_, find_handler, make_matmul, register_handler, register_layer
from gplq_mm.convert.handlers import HANDLERS
from gplq_mm.ops import QuantConv2d, QuantConvTranspose2d, QuantLinear, QuantMatMul, swap_class
from gplq_mm.quantizers import PerChannel, PerRow, PerTensor
from tests.helpers.models import Attention, Detector, QuantAttention

PER_CHANNEL = {'activation': {'granularity': 'per_channel'}, 'scope': 'all'}


@pytest.fixture
def handlers(monkeypatch):
    """Registrations of a test end with it."""
    monkeypatch.setattr('gplq_mm.convert.handlers.HANDLERS', dict(HANDLERS))


@pytest.fixture
def attention_handler(handlers):
    @register_handler(Attention)
    def convert_attention(module, name, context):
        qk = make_matmul(f'{name}.qk_matmul', context, ('query', 'key'), 1)
        pv = make_matmul(f'{name}.pv_matmul', context, ('softmax', 'value'), 1)
        if qk is None or pv is None:
            return
        swap_class(module, QuantAttention)
        module.qk_matmul, module.pv_matmul = qk, pv

    return convert_attention


def test_only_the_exact_class_has_a_handler(handlers):
    class Special(nn.Linear):
        """May compute something else."""

    assert find_handler(nn.Linear(1, 1)) is not None
    assert find_handler(Special(1, 1)) is None
    assert find_handler(nn.GELU()) is None


def test_a_registered_subclass_is_converted(handlers):
    class Special(nn.Linear):
        pass

    class QuantSpecial(QuantLinear, Special):
        pass

    register_layer(Special, QuantSpecial)
    model = nn.Sequential(Special(3, 2))
    assert convert_(model, 'w4a4').counts['linear'] == 1
    assert type(model[0]) is QuantSpecial and isinstance(model[0], Special)


@pytest.mark.parametrize(
    ('layer', 'cls', 'in_axis', 'out_axis', 'out_size'),
    [
        (nn.Linear(5, 7), QuantLinear, -1, 0, 7),
        (nn.Conv2d(5, 7, 3), QuantConv2d, -3, 0, 7),
        (nn.Conv2d(4, 8, 3, groups=2), QuantConv2d, -3, 0, 8),
        (nn.ConvTranspose2d(5, 7, 2), QuantConvTranspose2d, -3, 1, 7),
        (nn.ConvTranspose2d(4, 8, 2, groups=2), QuantConvTranspose2d, -3, 1, 4),
    ],
)
def test_axes_and_sizes_of_the_scales(layer, cls, in_axis, out_axis, out_size):
    convert_(nn.Sequential(layer), PER_CHANNEL)
    size = layer.in_features if cls is QuantLinear else layer.in_channels
    assert type(layer) is cls
    assert layer.input_quantizer.spec.granularity == PerChannel(in_axis)
    assert layer.input_quantizer.scale.shape == (size,)
    assert layer.weight_quantizer.spec.granularity == PerChannel(out_axis)
    assert layer.weight_quantizer.scale.shape == (out_size,)
    assert layer.weight_quantizer.kind == 'weight' and layer.input_quantizer.kind == 'activation'


def test_the_image_is_eight_bit_and_learned_scales_are_activations_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Conv2d(4, 4, 2))
    convert_(model, 'w4a4')
    assert [m.input_quantizer.spec.num_bits for m in model] == [8, 4]
    assert [m.weight_quantizer.spec.num_bits for m in model] == [8, 4]
    learned = {name for name, _ in model.named_parameters() if '_quantizer' in name}
    assert learned == {'0.input_quantizer.scale', '1.input_quantizer.scale'}


def test_weights_learn_their_scale_only_in_direct_training():
    model = nn.Sequential(nn.Linear(3, 4))
    convert_(model, dict(weight=dict(learn_scale=True, qat=True)))
    assert isinstance(model[0].weight_quantizer.scale, nn.Parameter)
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ValueError, match='qat=False and learn_scale=True have no effect without'):
        convert_(model, dict(weight=dict(learn_scale=True)))


GRID = dict(qat=True, learn_scale=True)


@pytest.mark.parametrize(
    ('weight', 'rule', 'learned'),
    [({}, GRID, [True, False]), (GRID, dict(qat=False), [False, True])],
)
def test_a_rule_puts_layers_on_their_grid_or_takes_them_off(weight, rule, learned):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    convert_(model, dict(weight=weight, rules=[dict(name='0', weight=rule)]))
    assert [layer.weight_quantizer.spec.learn_scale for layer in model] == learned


@pytest.mark.parametrize(
    'rule', [dict(qat=True), dict(learn_scale=True), dict(observer='mse'), dict(observer_args={})]
)
def test_a_rules_settings_of_a_grid_are_refused_without_one(rule):
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ValueError, match='ha(s|ve) no effect'):
        convert_(model, dict(rules=[dict(name='0', weight=rule)]))


def test_a_rule_for_weights_of_a_product_is_refused(attention_handler):
    rule = dict(role='query', weight=dict(num_bits=8))
    with pytest.raises(ValueError, match=r'matches no layer .*has no effect there'):
        convert_(Detector(), dict(rules=[rule]))


def test_an_attention_handler_adds_products_and_its_children_follow(attention_handler):
    model = Detector()
    report = convert_(model, 'w4a4', strict=True)
    attention = model.backbone.attn
    assert type(attention) is QuantAttention
    assert report.quantized['matmul'] == ['backbone.attn.qk_matmul', 'backbone.attn.pv_matmul']
    assert type(attention.qkv) is QuantLinear and 'backbone.attn.qkv' in report.quantized['linear']
    spec = attention.pv_matmul.lhs_quantizer.spec
    assert not spec.signed and spec.symmetric
    assert attention.qk_matmul.lhs_quantizer.spec.signed


def test_a_rule_turns_a_product_off(attention_handler):
    model = Detector()
    report = convert_(model, dict(rules=[dict(role='softmax', enabled=False)]), strict=True)
    assert type(model.backbone.attn) is Attention
    assert ('backbone.attn.pv_matmul', 'turned off by a rule') in report.kept_float


class Answers:
    """The part of a conversion's context that `make_matmul` uses."""

    def __init__(self, off=None):
        self.off, self.asked, self.counted, self.kept = off, [], [], []

    def activation(self, name, role, axis, size, row_axis=None):
        from gplq_mm.quantizers import FakeQuantizer, QuantSpec

        self.asked.append((name, role, axis, size, row_axis))
        granularity = PerTensor() if axis is None else PerChannel(axis)
        return None if role == self.off else FakeQuantizer(QuantSpec(granularity=granularity), size)

    def count(self, kind, name):
        self.counted.append((kind, name))

    def keep_float(self, name, reason):
        self.kept.append(name)


def test_make_matmul_asks_for_scales_a_head():
    context = Answers()
    matmul = make_matmul('a.qk', context, ('query', 'key'), 3)
    assert isinstance(matmul, QuantMatMul)
    assert context.asked == [('a.qk.lhs', 'query', 1, 3, -1), ('a.qk.rhs', 'key', 1, 3, -2)]
    assert context.counted == [('matmul', 'a.qk')] and not context.kept
    assert matmul.lhs_quantizer.scale.shape == (3,)


def test_make_matmul_without_heads_is_per_tensor():
    matmul = make_matmul('a', Answers(), ('query', 'key'), None)
    assert matmul.lhs_quantizer.scale.shape == matmul.rhs_quantizer.scale.shape == ()


@pytest.mark.parametrize('off', ['query', 'key'])
def test_make_matmul_with_one_operand_off_is_none(off):
    context = Answers(off)
    assert make_matmul('a', context, ('query', 'key'), 2) is None
    assert context.kept == ['a'] and not context.counted


@pytest.mark.parametrize('args', [dict(percentil=0.9), dict(percentile=0.3)])
def test_arguments_that_the_observer_does_not_take_are_refused_at_conversion(args):
    recipe = dict(activation=dict(observer='percentile', observer_args=args))
    with pytest.raises(ValueError, match=r'^0: observer_args=.*percentil.*observer=.percentile'):
        convert_(nn.Sequential(nn.Linear(2, 2)), recipe)


def test_the_presets_operands_of_attention_follow_the_summed_axis(attention_handler):
    model = Detector()
    convert_(model, 'w4a4', strict=True)
    attention = model.backbone.attn
    for product in (attention.qk_matmul, attention.pv_matmul):
        assert product.lhs_quantizer.spec.granularity == PerRow(-1)
        assert product.rhs_quantizer.spec.granularity == PerRow(-2)
        assert product.lhs_quantizer.scale.shape == product.rhs_quantizer.scale.shape == ()
    assert attention.pv_matmul.lhs_quantizer.spec.log_code == 'log2'
    assert attention.pv_matmul.rhs_quantizer.spec.log_code is None


@pytest.mark.parametrize('layer', [nn.Linear(3, 2), nn.Conv2d(4, 2, 1)])
def test_scales_a_row_are_refused_for_the_input_of_a_layer(layer):
    recipe = dict(activation=dict(granularity='per_row'))
    with pytest.raises(ValueError, match=r"^0: granularity='per_row' is for the operands of att"):
        convert_(nn.Sequential(layer), recipe)
