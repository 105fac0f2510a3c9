# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Training curves from logged scalars."""

from gplq_mm.pages.training_curves import MOST_POINTS, curves


def test_curves_are_thinned_and_keep_their_ends() -> None:
    scalars = [dict(step=i, loss=float(i), loss_x=1.0, lr=0.1, time=9.0) for i in range(1, 2001)]
    found = curves(scalars)
    assert list(found) == ['loss', 'loss_x', 'lr']
    points = found['loss']
    assert len(points) <= MOST_POINTS + 1
    assert (points[0]['x'], points[-1]['x']) == (1, 2000)


def test_a_resumed_run_replaces_what_it_repeats() -> None:
    scalars = [dict(step=i, loss=1.0) for i in (1, 2, 3)] + [dict(step=2, loss=5.0)]
    assert [p['y'] for p in curves(scalars)['loss']] == [1.0, 5.0, 1.0]


def test_losses_of_parts_are_shown() -> None:
    assert list(curves([{'decode.loss_ce': 1.0, 'iter': 1}])) == ['decode.loss_ce']
