# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Settings that follow the task, and those that a user has given."""

import pytest

from gplq_mm.conversion import PRESETS, resolve_recipe, settle_auto


@pytest.mark.parametrize('preset', sorted(PRESETS))
@pytest.mark.parametrize('is_detector', [True, False], ids=['detector', 'classifier'])
def test_nothing_stays_auto(preset: str, is_detector: bool) -> None:
    settled = settle_auto(resolve_recipe(preset), is_detector)
    assert 'auto' not in [*settled['optim'].values(), *settled['calibration'].values()]


def test_detectors_keep_their_drop_rates_and_classifiers_drop_nothing() -> None:
    found = [settle_auto(resolve_recipe('w4a4'), d)['optim']['drop_rates'] for d in (True, False)]
    assert found == ['keep', 'off']


def test_what_is_given_stays() -> None:
    optim = dict(lr=1e-5, betas=[0.8, 0.9], drop_rates='off')
    settled = settle_auto(resolve_recipe(dict(base='w4a4', optim=optim)), is_detector=True)
    assert {key: settled['optim'][key] for key in optim} == optim
    assert settled['optim']['scale_lr'] == 5e-4


def test_settled_recipes_share_no_list() -> None:
    one, two = (settle_auto(resolve_recipe('w4a4'), False) for _ in range(2))
    assert one['optim']['betas'] is not two['optim']['betas']
