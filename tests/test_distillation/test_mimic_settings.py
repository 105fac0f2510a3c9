# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What a recipe's `mimic` means for a model, and what is refused."""

from typing import Any

import pytest

from gplq_mm.distillation.mimic_settings import resolve_mimic


def resolved(mimic: Any, is_detector: bool = False) -> dict[str, Any]:
    found = resolve_mimic(mimic, is_detector)
    assert found is not None
    return found


def test_types_follow_the_model_and_the_paper() -> None:
    assert resolve_mimic(None, True) is None
    assert resolve_mimic([], True) is None
    assert resolve_mimic(dict(type=None), True) is None
    assert resolve_mimic(dict(type='paper'), True) is None
    chosen = [
        resolved(dict(type=name), is_detector)
        for name, is_detector in (('auto', True), ('auto', False), ('paper', False))
    ]
    kinds = [[(t['type'], t.get('layer')) for t in c['terms']] for c in chosen]
    assert kinds == [
        [('feature', None)],
        [('logits', None), ('feature', 'penultimate')],
        [('pca', 'penultimate')],
    ]
    assert [c['task_weight'] for c in chosen] == [1.0, 1.0, 1.0]


def test_auto_takes_the_keys_of_its_terms() -> None:
    given = dict(type='auto', task_weight=0.25, temperature=2.0, loss_weight=3.0, layer='backbone')
    found = resolved(given)
    assert found['task_weight'] == 0.25
    assert found['terms'] == [
        dict(type='logits', loss_weight=3.0, temperature=2.0),
        dict(type='feature', loss_weight=3.0, layer='backbone'),
    ]


def test_auto_without_a_penultimate_feature_compares_logits_only() -> None:
    found = resolve_mimic(dict(type='auto'), False, has_penultimate=False)
    assert found is not None
    assert [term['type'] for term in found['terms']] == ['logits']


def test_a_segmentor_compares_features_and_the_logits_of_pixels() -> None:
    found = resolve_mimic(dict(type='auto', temperature=2.0), True, False, has_logits=True)
    assert found is not None
    assert [(t['type'], t.get('layer')) for t in found['terms']] == [
        ('logits', None),
        ('feature', None),
    ]
    assert resolve_mimic(dict(type='logits'), True, False, has_logits=True) is not None
    with pytest.raises(ValueError, match='needs a classifier'):
        resolve_mimic(dict(type='pca'), True, False, has_logits=True)


def test_a_term_holds_what_its_type_uses() -> None:
    given = dict(type='paper', explained_variance=0.7, loss_weight=0.5)
    assert resolved(given)['terms'] == [
        dict(
            type='pca',
            loss_weight=0.5,
            layer='penultimate',
            explained_variance=0.7,
            num_images=None,
        )
    ]


def test_several_terms_share_one_task_weight() -> None:
    found = resolved([dict(type='pca'), dict(type='logits', temperature=2.0, task_weight=0.0)])
    assert [term['type'] for term in found['terms']] == ['pca', 'logits']
    assert found['task_weight'] == 0.0
    layers = [dict(type='pca', layer='backbone.layers.0'), dict(type='pca')]
    assert len(resolved(layers)['terms']) == 2
    assert resolved(dict(type='pca', layer='neck'), True)['terms'][0]['layer'] == 'neck'


@pytest.mark.parametrize(
    ('mimic', 'is_detector', 'message'),
    [
        (dict(type='feature', weigth=1.0), True, "no key 'weigth'"),
        (dict(type='features'), True, "'features'.*'feature'"),
        (dict(type='logits'), True, "needs a classifier; write 'feature'"),
        (dict(type='pca'), True, "needs a classifier; write 'feature'"),
        (dict(type='feature', layer='penultimate'), True, 'needs a classifier'),
        (
            dict(type='pca', explained_variance=0),
            False,
            r'explained_variance=0: write a number above',
        ),
        (dict(type='pca', num_images=0), False, 'num_images=0: write a positive integer'),
        (dict(type='logits', temperature=0), False, 'temperature=0: write a positive number'),
        (dict(type='logits', loss_weight=-1), False, 'loss_weight=-1'),
        ('pca', False, r"mimic='pca': write a dict of .*'type'"),
        (dict(type='logits', layer='neck'), False, r"layer='neck' has no effect with type='logits"),
        ([dict(type='pca'), dict(type='paper')], False, 'two terms compare the same'),
        (
            [dict(type='pca', task_weight=1), dict(type='logits', task_weight=0)],
            False,
            r'task_weight is \[0, 1\]; give one',
        ),
    ],
)
def test_settings_that_do_not_fit(mimic: dict[str, Any], is_detector: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_mimic(mimic, is_detector)
