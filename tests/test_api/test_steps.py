# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Each step does what the functions below it do, bit for bit, and refuses what cannot be done."""

import copy
import logging
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gplq_mm
from gplq_mm.calibration.activation_ranges import calibrate_activations
from gplq_mm.calibration.layerwise import calibrate_layerwise
from gplq_mm.convert import convert_, quantizers, resolve_recipe, settle_auto
from gplq_mm.distillation.losses import RelativeFeatureLoss, SoftLogitLoss
from gplq_mm.ptq.stage2 import run_stage2
from tests.helpers.plain_vit import PlainViT, pixels, plain_vit

MINMAX = dict(weight=dict(ptq='minmax'))
STEPS = ('quantize', 'calibrate', 'distill', 'train_stage1', 'quantize_weights', 'save', 'load')
X = pixels(32)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    own, other = a.state_dict(), b.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in own)


def calibrated(recipe: Any = 'w4a4', loader: Any = None, **options: Any) -> PlainViT:
    model = plain_vit()
    gplq_mm.quantize(model, recipe)
    gplq_mm.calibrate(model, X.split(8) if loader is None and not options else loader, **options)
    return model


@pytest.fixture(scope='module')
def reference() -> PlainViT:
    """Calibrated once; tests work on copies."""
    return calibrated()


def test_no_function_has_the_name_of_a_subpackage() -> None:
    modules = {module.name for module in pkgutil.iter_modules(gplq_mm.__path__)}
    assert not modules & set(gplq_mm.__all__)
    assert set(STEPS) <= set(gplq_mm.__all__)
    assert all(callable(getattr(gplq_mm, name)) for name in STEPS)
    with pytest.raises(AttributeError, match='no attribute'):
        gplq_mm.nothing  # noqa: B018


def test_calibration_is_that_of_the_algorithms(reference: PlainViT) -> None:
    model = plain_vit()
    recipe = settle_auto({**resolve_recipe('w4a4'), 'scope': 'all'}, False, 16)
    convert_(model, recipe)
    model.eval()

    def run_pass() -> None:
        with torch.no_grad():
            for start in range(0, 32, 8):
                model(X[start : start + 8])

    calibrate_activations(model, run_pass)
    fits = calibrate_layerwise(model, run_pass).compensations
    assert {f'blocks.0.attn.{name}' for name in ('in_proj_q', 'in_proj_v', 'out_proj')} <= set(fits)
    assert same_state(model, reference)
    assert reference.gplq.recipe == recipe


@pytest.mark.parametrize(
    'loader',
    [
        [X],
        [(part, torch.zeros(5)) for part in X.split(5)],
        [dict(pixels=part) for part in X.split(16)],
        [[dict(pixels=part), 'more'] for part in X.split(16)],
    ],
    ids=['one batch', 'pairs', 'names', 'names in a list'],
)
def test_the_form_of_a_loader_changes_nothing(loader: Any, reference: PlainViT) -> None:
    assert same_state(calibrated(loader=loader), reference)


def test_a_loop_of_ones_own_and_the_mode_is_kept(reference: PlainViT) -> None:
    def loop(model: nn.Module) -> None:
        assert not model.training
        for part in X.split(8):
            model(part)

    model = calibrated(forward_loop=loop)
    assert same_state(model, reference)
    assert model.training and model.head.input_quantizer.training
    evaluated = plain_vit().eval()
    gplq_mm.quantize(evaluated)
    assert not any(module.training for module in evaluated.modules())


def test_distillation_is_the_losses_of_logits_and_penultimate_feature(
    reference: PlainViT,
) -> None:
    model, teacher, x = copy.deepcopy(reference), plain_vit(), X[:4]
    mimic = gplq_mm.distill(model, teacher)
    loss = mimic(x)
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    kept: list[Tensor] = []
    for network in (model, teacher):
        network.head.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    model.zero_grad()
    logits, target = model(x), teacher(x)
    expected = SoftLogitLoss()(logits, target) + RelativeFeatureLoss()(kept[:1], kept[1:])
    expected.backward()
    assert torch.equal(loss, expected) and torch.equal(mimic.output, logits)
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    'mimic',
    [
        dict(type='pca', num_images=16),
        dict(type='feature', layer='blocks.1'),
        dict(type='logits', temperature=2.0),
        [dict(type='pca', layer='norm'), dict(type='logits', loss_weight=0.5)],
    ],
)
def test_other_terms_of_the_recipe(mimic: Any) -> None:
    model = calibrated(dict(mimic=mimic, **MINMAX))
    loss = gplq_mm.distill(model, plain_vit(), X.split(8))(X[:4])
    assert 0 < loss.item() < 10


def test_training_lowers_the_loss_and_moves_scales(reference: PlainViT) -> None:
    model = copy.deepcopy(reference)
    scales = {n: q.scale.clone() for n, q in quantizers(model, 'activation').items()}
    loader = [(x, x.mean((1, 2, 3)).gt(0).long()) for x in X.split(8)]
    means = gplq_mm.train_stage1(model, plain_vit(), loader, epochs=4)
    assert len(means) == 4 and means[-1] < means[0]
    moved = [n for n, q in quantizers(model, 'activation').items() if (q.scale != scales[n]).any()]
    assert len(moved) == len(scales)
    with pytest.raises(ValueError, match='without targets'):
        gplq_mm.train_stage1(model, plain_vit(), X.split(8))
    gplq_mm.train_stage1(model, plain_vit(), X.split(16), task_loss=None)


def test_the_optimizer_is_the_recipes(reference: PlainViT) -> None:
    weights, scales = gplq_mm.stage1_optimizer(reference, steps=390).param_groups
    assert (weights['lr'], scales['lr'], weights['betas']) == (1e-3, 1e-3, (0.9, 0.99))
    weights, scales = gplq_mm.stage1_optimizer(reference, steps=39).param_groups
    assert weights['lr'] == pytest.approx(1e-3 * 0.1**0.5) and scales['lr'] == 1e-3


def test_stage_2_is_that_of_the_algorithms(reference: PlainViT) -> None:
    model, other = copy.deepcopy(reference), copy.deepcopy(reference)

    def run_pass() -> None:
        for part in X.split(8):
            other.eval()(part)

    result = gplq_mm.quantize_weights(model, X.split(4))
    run_stage2(other, other.gplq.recipe, run_pass, seed=0)
    assert same_state(model, other)
    assert result.summary['mean_sqnr_db'] > 5


def test_fine_tuning_aims_at_the_teacher_where_there_is_one() -> None:
    recipe = {**MINMAX, 'weight': dict(ptq=['mse', dict(type='finetune', lr=0.01)])}
    model = calibrated(recipe)
    other = copy.deepcopy(model)
    assert gplq_mm.quantize_weights(model, X.split(8), teacher=plain_vit()).notes == []
    assert 'no float model' in gplq_mm.quantize_weights(other, X.split(8)).notes[0]
    assert not same_state(model, other)
    with pytest.raises(ValueError, match='the teacher is quantized itself'):
        gplq_mm.quantize_weights(calibrated(recipe), X.split(8), teacher=other)


def test_a_teacher_without_effect_is_refused_before_images_are_read(reference: PlainViT) -> None:
    def unread() -> Any:
        raise AssertionError('an image was read')
        yield

    model = copy.deepcopy(reference)
    message = (
        r"teacher has no effect: weight.ptq=\['gptq'\] does not use it, only \['finetune'\] does; "
        r".*recipe=dict\(weight=dict\(ptq=\['gptq', 'finetune'\]\)\)"
    )
    with pytest.raises(ValueError, match=message):
        gplq_mm.quantize_weights(model, unread(), teacher=plain_vit())
    assert same_state(model, reference) and model.gplq.stage == reference.gplq.stage
    trained = calibrated({'weight': dict(qat=True, learn_scale=True, ptq=['mse', 'finetune'])})
    with pytest.raises(ValueError, match=r'every weight was quantized in stage 1'):
        gplq_mm.quantize_weights(trained, unread(), teacher=plain_vit())


@pytest.mark.parametrize('weights', [False, True])
def test_a_loaded_model_gives_equal_bits(weights: bool, reference: PlainViT, tmp_path) -> None:
    model = copy.deepcopy(reference).eval()
    if weights:
        gplq_mm.quantize_weights(model, X.split(8))
    gplq_mm.save(model, tmp_path / 'm.pth')
    loaded = gplq_mm.load(tmp_path / 'm.pth', plain_vit(seed=3), recipe='w4a4')
    assert same_state(loaded, model)
    assert torch.equal(loaded(X), model(X)) and not loaded.training
    assert loaded.gplq == model.gplq
    about = torch.load(tmp_path / 'm.pth', weights_only=True)['gplq']
    assert about['gplq_mm_version'] == gplq_mm.__version__
    assert about['coverage'] == model.gplq.coverage.as_dict()
    if not weights:
        gplq_mm.quantize_weights(loaded, X.split(8))  # goes on where it stopped


def test_a_failed_save_leaves_the_old_file(reference: PlainViT, tmp_path, monkeypatch) -> None:
    path = tmp_path / 'm.pth'
    gplq_mm.save(reference, path)
    before = path.read_bytes()
    monkeypatch.setattr(torch, 'save', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gplq_mm.save(reference, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


class WiderViT(PlainViT):
    def __init__(self) -> None:
        super().__init__(classes=4)


@pytest.mark.parametrize(
    ('network', 'recipe', 'message'),
    [
        (plain_vit, 'w3a3', r'made with another recipe.*activation.num_bits: 4 != 3'),
        (
            WiderViT,
            None,
            r'does not fit WiderViT: other shapes: head.weight \(3, 16\), model \(4, 16\)',
        ),
        (lambda: PlainViT(depth=1), None, 'keys that the model does not have: blocks.1'),
        (lambda: PlainViT(depth=3), None, 'missing keys: blocks.2'),
        (lambda: nn.ReLU(), None, 'does not fit ReLU: nothing was quantized'),
    ],
)
def test_another_recipe_or_model_is_refused(
    network: Callable[[], nn.Module], recipe: Any, message: str, reference: PlainViT, tmp_path
) -> None:
    gplq_mm.save(reference, tmp_path / 'm.pth')
    with pytest.raises(ValueError, match=message) as caught:
        gplq_mm.load(tmp_path / 'm.pth', network(), recipe)
    assert '\n' not in str(caught.value)


def test_another_file_is_refused(reference: PlainViT, tmp_path) -> None:
    torch.save(plain_vit().state_dict(), tmp_path / 'float.pth')
    with pytest.raises(ValueError, match='was not written by gplq_mm.save'):
        gplq_mm.load(tmp_path / 'float.pth', plain_vit())
    with pytest.raises(FileNotFoundError):
        gplq_mm.load(tmp_path / 'none.pth', plain_vit())
    gplq_mm.save(reference, tmp_path / 'm.pth')
    content = torch.load(tmp_path / 'm.pth', weights_only=True)
    content['gplq']['format_version'] = 99
    torch.save(content, tmp_path / 'm.pth')
    with pytest.raises(ValueError, match='format 99'):
        gplq_mm.load(tmp_path / 'm.pth', plain_vit())


BAD_LOADERS = [
    ([], 'the loader is empty'),
    (X, r'loader is a tensor.*x.split'),
    ([3], 'the loader yields int'),
    ([('a', X)], 'the loader yields tuple; it has to yield'),
    ([dict(pixels=X, name='a')], r"dict whose \['name'\] are not tensors"),
    ([X * float('nan')], 'NaN'),
    (None, 'one of two forms'),
]


@pytest.mark.parametrize(('loader', 'message'), BAD_LOADERS)
def test_a_bad_loader_is_refused_in_one_line(loader: Any, message: str) -> None:
    model = plain_vit()
    gplq_mm.quantize(model, dict(calibration=dict(migrate=False, compensate=False)))
    with pytest.raises(ValueError, match=message) as caught:
        gplq_mm.calibrate(model, loader)
    assert '\n' not in str(caught.value)


def test_too_few_images_for_a_number_that_was_asked_for() -> None:
    model = plain_vit()
    gplq_mm.quantize(model, dict(calibration=dict(num_images=40)))
    with pytest.raises(ValueError, match=r'asks for 40 .* gives 32; .*num_images=32'):
        gplq_mm.calibrate(model, [X])


def test_steps_out_of_order_are_refused(reference: PlainViT) -> None:
    teacher = plain_vit()
    for call in (
        lambda m: gplq_mm.calibrate(m, [X]),
        lambda m: gplq_mm.distill(m, teacher),
        lambda m: gplq_mm.quantize_weights(m, [X]),
        lambda m: gplq_mm.save(m, 'x'),
    ):
        with pytest.raises(ValueError, match=r'is not quantized; write gplq_mm.quantize'):
            call(plain_vit())
    fresh = plain_vit()
    gplq_mm.quantize(fresh)
    for call in (
        lambda m: gplq_mm.distill(m, teacher),
        lambda m: gplq_mm.stage1_optimizer(m, 1),
        lambda m: gplq_mm.quantize_weights(m, [X]),
        lambda m: gplq_mm.save(m, 'x'),
    ):
        with pytest.raises(ValueError, match='is not calibrated; write gplq_mm.calibrate'):
            call(fresh)
    with pytest.raises(ValueError, match='already quantized; give a float model'):
        gplq_mm.quantize(fresh)
    model = copy.deepcopy(reference)
    with pytest.raises(ValueError, match='already calibrated'):
        gplq_mm.calibrate(model, [X])
    with pytest.raises(ValueError, match=r'teacher = copy.deepcopy\(model\)'):
        gplq_mm.distill(model, reference)
    with pytest.raises(ValueError, match='needs calibration images'):
        gplq_mm.quantize_weights(model)
    gplq_mm.quantize_weights(model, [X])
    with pytest.raises(ValueError, match='weights are already quantized'):
        gplq_mm.quantize_weights(model, [X])
    with pytest.raises(ValueError, match='weights are already quantized'):
        gplq_mm.train_stage1(model, teacher, [(X, torch.zeros(32).long())])


def test_training_refuses_what_cannot_be_trained(reference: PlainViT) -> None:
    model, teacher = copy.deepcopy(reference), plain_vit()
    with pytest.raises(ValueError, match='nothing to train on'):
        gplq_mm.train_stage1(model, teacher, [])
    with pytest.raises(ValueError, match=r'the loss of epoch 1 is nan'):
        bad = [(X[:8], torch.zeros(8).long())]
        gplq_mm.train_stage1(
            model, teacher, bad, task_loss=lambda y, t: F.cross_entropy(y, t) * float('nan')
        )


def test_what_stays_float_is_logged(caplog) -> None:
    class OtherAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)

    model = nn.Sequential(OtherAttention(), nn.Bilinear(2, 2, 2))
    with caplog.at_level(logging.INFO, 'gplq_mm'):
        coverage = gplq_mm.quantize(model)
    assert [name for name, _ in coverage.kept_float] == ['0', '1']
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [f'{name} stays float: {reason}' for name, reason in coverage.kept_float]
    with pytest.raises(ValueError, match='these stay float'):
        gplq_mm.quantize(nn.Sequential(OtherAttention()), strict=True)
