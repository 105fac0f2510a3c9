# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What became of each box, and how much predictions differ."""

import pytest

from gplq_mm.integrations.mm.predictions.differences import (
    box_difference,
    box_states,
    label_difference,
)

CAT = [0.0, 0.0, 0.5, 0.5, 0.9, 0]
DOG = [0.5, 0.5, 1.0, 1.0, 0.8, 1]


def test_equal_predictions_differ_by_nothing() -> None:
    assert box_states([CAT, DOG], [DOG, CAT]) == (['kept', 'kept'], ['kept', 'kept'])
    assert box_difference([CAT, DOG], [DOG, CAT]) == 0
    assert box_difference([], []) == 0
    assert label_difference(dict(label=1, score=0.9), dict(label=1, score=0.4)) == 0


def test_lost_won_and_changed_boxes() -> None:
    renamed = [*CAT[:4], 0.6, 1]
    small = [0.0, 0.0, 0.2, 0.2, 0.5, 0]  # overlaps by 0.16
    assert box_states([CAT, DOG], [renamed]) == (['changed', 'lost'], ['changed'])
    assert box_difference([CAT, DOG], [renamed]) == pytest.approx(0.9 + 0.8 + 0.6)
    assert box_states([CAT], [small]) == (['lost'], ['won'])
    assert box_states([], [CAT]) == ([], ['won'])


def test_a_box_matches_its_own_class_first_and_one_box_only() -> None:
    other = [*CAT[:4], 0.95, 1]
    assert box_states([CAT], [other, CAT]) == (['kept'], ['won', 'kept'])
    assert box_states([CAT, CAT], [CAT]) == (['kept', 'lost'], ['kept'])
