# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Checkpoints of the former presets, run with configs that name the present ones."""

import copy
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

pytest.importorskip('mmpretrain')

from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import load_checkpoint

from gplq_mm.convert import quantizers
from gplq_mm.integrations.mm.checkpoints.former_recipe import take_former_form_
from gplq_mm.integrations.mm.checkpoints.run_checkpoint import check_quantized, record
from gplq_mm.integrations.mm.hook import GPLQHook
from gplq_mm.recipe.presets import FORMER_PRESETS
from tests.helpers.backbones import BACKBONES
from tests.helpers.mm_models import (
    CLASSIFIERS,
    calibrate_activations,
    calibrate_weights,
)
from tests.helpers.mm_models import tensors as flat

KINDS = {k: v for k, v in {**CLASSIFIERS, **BACKBONES}.items() if k in ('vit', 'swin', 'mvit')}


def build(kind: str, recipe: Any) -> Any:
    torch.manual_seed(0)
    cfg = copy.deepcopy(KINDS[kind][0])
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(dict(type='gplq_mm.GPLQ', model=cfg, recipe=recipe))
    model.eval()
    return model


def images(kind: str) -> Tensor:
    size = KINDS[kind][1]
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def outputs(model: Any, kind: str) -> list[Tensor]:
    with torch.no_grad():
        return flat(model(images(kind)))


def former_model(kind: str, recipe: Any, stage: str) -> Any:
    model = build(kind, recipe)
    calibrate_activations(model, lambda: model(images(kind)))
    if stage == 'stage2':
        calibrate_weights(model)
    return model


def checkpoint_of(model: Any, stage: str) -> dict[str, Any]:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return {'state_dict': state, 'gplq': record(model, stage, {'path': 'x', 'sha256': None})}


def assert_same(one: list[Tensor], two: list[Tensor]) -> None:
    assert len(one) == len(two) > 0
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


PER_HEAD = {
    **FORMER_PRESETS['w4a4'],
    'activation': {**FORMER_PRESETS['w4a4']['activation'], 'granularity': 'per_channel'},
}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('stage', ['stage1', 'stage2'])
@pytest.mark.parametrize('recipe', [FORMER_PRESETS['w4a4'], PER_HEAD], ids=['preset', 'per_head'])
def test_a_former_checkpoint_gives_the_same_bits(kind: str, stage: str, recipe: Any) -> None:
    former = former_model(kind, recipe, stage)
    checkpoint, model = checkpoint_of(former, stage), build(kind, 'w4a4')
    take_former_form_(model, checkpoint)
    check_quantized(model, checkpoint)
    model.load_state_dict(checkpoint['state_dict'])
    assert model.gplq.recipe == former.gplq.recipe.change(name='w4a4_v1')
    for name, quantizer in quantizers(former).items():
        assert quantizers(model)[name].spec == quantizer.spec
    assert_same(outputs(model, kind), outputs(former, kind))


@pytest.mark.parametrize('kind', KINDS)
def test_it_does_where_no_hook_runs(kind: str, tmp_path: Any) -> None:
    former = former_model(kind, FORMER_PRESETS['w3a3'], 'stage2')
    torch.save(checkpoint_of(former, 'stage2'), tmp_path / 'final.pth')
    model = build(kind, 'w3a3')
    load_checkpoint(model, str(tmp_path / 'final.pth'), map_location='cpu')
    assert_same(outputs(model, kind), outputs(former, kind))


def test_the_config_still_decides_stage_2() -> None:
    checkpoint = checkpoint_of(former_model('vit', FORMER_PRESETS['w4a4'], 'stage1'), 'stage1')
    model = build('vit', dict(base='w4a4', weight=dict(ptq='mse', num_bits=3)))
    take_former_form_(model, checkpoint)
    check_quantized(model, checkpoint)
    assert model.gplq.recipe.weight.ptq == 'mse'
    assert model.gplq.recipe.weight.num_bits == 3
    assert model.gplq.recipe.name == 'w4a4_v1 (customized)'


@pytest.mark.parametrize(
    ('recipe', 'named'),
    [
        ('w3a3', r'activation\.num_bits: 4 != 3; weight\.num_bits: 4 != 3$'),
        (dict(base='w4a4', scope=['layers']), r"scope: 'all' != \['layers'\]$"),
        (
            dict(base='w4a4', activation=dict(symmetric=True)),
            r'activation\.symmetric: False != True$',
        ),
    ],
)
def test_a_recipe_that_differs_in_more_is_refused_by_name(recipe: Any, named: str) -> None:
    checkpoint = checkpoint_of(former_model('vit', FORMER_PRESETS['w4a4'], 'stage2'), 'stage2')
    model = build('vit', recipe)
    before = {n: q.spec for n, q in quantizers(model).items()}
    take_former_form_(model, checkpoint)
    assert {n: q.spec for n, q in quantizers(model).items()} == before
    with pytest.raises(ValueError, match=f'another recipe; checkpoint != config: {named}'):
        check_quantized(model, checkpoint)


@pytest.mark.parametrize('recipe', ['w4a4', dict(base='w4a4', optim=dict(lr=1e-3))])
def test_a_training_is_told_what_to_write(recipe: Any) -> None:
    checkpoint = checkpoint_of(former_model('vit', FORMER_PRESETS['w4a4'], 'stage1'), 'calibrated')
    with pytest.raises(
        ValueError, match=r"keeps the quantizers .* write recipe='w4a4_v1', or recipe=dict"
    ):
        check_quantized(build('vit', recipe), checkpoint)
    check_quantized(build('vit', 'w4a4_v1'), checkpoint)


def test_the_hook_takes_the_form_for_a_test_and_refuses_it_for_a_training() -> None:
    checkpoint = checkpoint_of(former_model('vit', FORMER_PRESETS['w4a4'], 'stage1'), 'calibrated')
    checkpoint['meta'] = {'epoch': 0}
    model, hook = build('vit', 'w4a4'), GPLQHook()
    runner: Any = SimpleNamespace(model=model, _resume=True)
    hook.session = cast(Any, 'a training')
    with pytest.raises(ValueError, match=r"write recipe='w4a4_v1'"):
        hook.after_load_checkpoint(runner, checkpoint)
    assert model.gplq.recipe.name == 'w4a4'
    hook.session = None
    hook.after_load_checkpoint(runner, checkpoint)
    assert model.gplq.recipe.name == 'w4a4_v1'


def test_a_present_checkpoint_does_not_enter_a_former_model() -> None:
    present = former_model('vit', 'w4a4', 'stage1')
    checkpoint, model = checkpoint_of(present, 'stage1'), build('vit', 'w4a4_v1')
    take_former_form_(model, checkpoint)
    with pytest.raises(ValueError, match=r'another recipe; .*activation\.granularity'):
        check_quantized(model, checkpoint)
    with pytest.raises(ValueError, match=r'the checkpoint holds .* codes with .* this config has'):
        model.load_state_dict(checkpoint['state_dict'])
    assert model.gplq.recipe.name == 'w4a4_v1'
