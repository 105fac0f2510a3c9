# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Settings that follow from the task."""

from typing import get_args

import pytest
from torch import nn

from gplq_mm.convert import PRESETS, resolve_recipe, settle_auto, typical_width
from gplq_mm.recipe import CalibrationSettings, OptimSettings
from gplq_mm.recipe.auto_settings import _CLASSIFIER, _DETECTOR
from gplq_mm.recipe.check import alternatives


@pytest.mark.parametrize('is_detector', [True, False])
@pytest.mark.parametrize('name', sorted(PRESETS))
def test_nothing_is_left_auto(name: str, is_detector: bool) -> None:
    recipe = settle_auto(name, is_detector).as_dict()
    assert 'auto' not in [*recipe['optim'].values(), *recipe['calibration'].values()]
    assert resolve_recipe(recipe) == recipe


def test_a_given_number_stays() -> None:
    recipe = resolve_recipe(dict(optim=dict(lr=3e-6), calibration=dict(num_images=7)))
    settled = settle_auto(recipe, is_detector=False).as_dict()
    assert (settled['optim']['lr'], settled['calibration']['num_images']) == (3e-6, 7)
    assert settled['optim']['scale_lr'] == 1e-3
    assert 'all_if_fewer' not in settled['calibration']


def test_other_settings_cannot_be_auto() -> None:
    with pytest.raises(ValueError, match=r"weight_decay='auto'"):
        resolve_recipe(dict(optim=dict(weight_decay='auto')))
    with pytest.raises(ValueError, match=r"scale_weight_decay='auto'"):
        resolve_recipe(dict(optim=dict(scale_weight_decay='auto')))


def test_detectors_keep_their_drop_rates_and_classifiers_drop_nothing() -> None:
    found = [settle_auto('w4a4', d).optim.drop_rates for d in (True, False)]
    assert found == ['keep', 'off']


def test_given_pairs_and_names_stay() -> None:
    optim = dict(lr=1e-5, betas=[0.8, 0.9], drop_rates='off')
    settled = settle_auto(dict(base='w4a4', optim=optim), is_detector=True).as_dict()
    assert {key: settled['optim'][key] for key in optim} == optim
    assert settled['optim']['scale_lr'] == 5e-4


def test_settled_recipes_share_no_list() -> None:
    one, two = (settle_auto('w4a4', False).as_dict() for _ in range(2))
    assert one['optim']['betas'] is not two['optim']['betas']


@pytest.mark.parametrize(
    ('width', 'rates'),
    [(None, (1e-3, 1e-3, 390)), (128, (1e-3, 1e-3, 390)), (192, (1e-6, 1e-3, 0))],
)
def test_pretrained_classifiers_hardly_move(width: float | None, rates: tuple) -> None:
    found = settle_auto('w4a4', False, width).optim
    assert (found.lr, found.scale_lr, found.lr_iterations) == rates
    assert settle_auto('w4a4', True, width).optim.lr == 5e-5
    given = resolve_recipe(dict(base='w4a4', optim=dict(lr=2e-3)))
    assert settle_auto(given, False, width).optim.lr == 2e-3


@pytest.mark.parametrize(('width', 'lr'), [(None, 1e-3), (128, 1e-3), (768, 1.7e-4)])
def test_former_presets_keep_their_rates(width: float | None, lr: float) -> None:
    found = settle_auto('w4a4_v1', False, width).optim
    assert (found.lr, found.scale_lr) == (lr, 1e-3)


def test_a_given_learning_rate_holds_for_any_length() -> None:
    lengths = {}
    for name, optim in {
        'auto': {},
        'lr': {'lr': 2e-3},
        'both': {'lr': 2e-3, 'lr_iterations': 7},
    }.items():
        recipe = resolve_recipe(dict(base='w4a4', optim=optim))
        lengths[name] = [settle_auto(recipe, d).optim.lr_iterations for d in (False, True)]
    assert lengths == {'auto': [390, 0], 'lr': [0, 0], 'both': [7, 7]}
    with pytest.raises(ValueError, match='lr_iterations=-1: write an integer from 0'):
        resolve_recipe(dict(optim=dict(lr_iterations=-1)))


def test_the_width_is_that_of_the_layers_there_are() -> None:
    assert typical_width(nn.Conv2d(3, 8, 1)) is None
    stages = [nn.Linear(48, 48), nn.Linear(96, 96), nn.Linear(192, 192)]
    assert typical_width(nn.Sequential(*stages)) == 96


@pytest.mark.parametrize(('images', 'batch'), [('auto', 8), (128, 8), (40, 2), (8, 1)])
def test_few_calibration_images_make_small_batches(images: int | str, batch: int) -> None:
    recipe = resolve_recipe(dict(calibration=dict(num_images=images)))
    assert settle_auto(recipe, is_detector=False).calibration.batch_size == batch
    assert settle_auto(recipe, is_detector=True).calibration.batch_size == 1


def test_what_may_be_auto_is_what_gets_a_number() -> None:
    settled = {*_DETECTOR}
    assert settled == {*_CLASSIFIER}
    sections = {'calibration': CalibrationSettings, 'optim': OptimSettings}
    allowed = {
        (name, key)
        for name, section in sections.items()
        for key, (hint, _) in section.keys().items()
        if any('auto' in get_args(kind) for kind in alternatives(hint))
    }
    assert settled == allowed


def test_all_if_fewer_comes_with_a_number_nobody_asked_for() -> None:
    assert settle_auto('w4a4', False).calibration.all_if_fewer
    given = settle_auto(dict(calibration=dict(all_if_fewer=False)), False)
    assert given.calibration.num_images == 128 and not given.calibration.all_if_fewer
