# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Rows of the tables: values, changes, what is better."""

from gplq_mm.pages.figures import class_rows, cost_rows, main_metric, metric_rows
from tests.helpers.reports import report_data


def test_main_metric_is_the_known_one_else_the_first() -> None:
    row = main_metric(report_data())
    assert row is not None and row.name == 'coco/bbox_mAP'
    assert main_metric(report_data(fp32={}, stage1={}, stage2={})) is None
    other = main_metric(report_data(fp32={'metrics': {'own/x': 1.0}}, stage1={}, stage2={}))
    assert other is not None and other.name == 'own/x'


def test_less_is_better_for_errors_and_losses() -> None:
    fp32 = {'metrics': {'depth/error': 1.0, 'accuracy/top1': 90.0}}
    stage2 = {'metrics': {'depth/error': 1.5, 'accuracy/top1': 91.5}}
    rows = metric_rows(report_data(fp32=fp32, stage1={}, stage2=stage2))
    assert [(r.name, r.changes['stage2'], r.verdict) for r in rows] == [
        ('depth/error', '+0.5', 'worse'),
        ('accuracy/top1', '+1.50', 'better'),
    ]


def test_classes_are_ordered_by_their_loss() -> None:
    fp32 = {'metrics': {}, 'per_class': {'cat': 90.0, 'dog': 80.0, 'new': 70.0}}
    stage2 = {'metrics': {}, 'per_class': {'cat': 60.0, 'dog': 79.0}}
    rows = class_rows(report_data(fp32=fp32, stage1={}, stage2=stage2))
    assert [row.name for row in rows] == ['cat', 'dog', 'new']
    assert rows[0].changes == {'stage2': '-30.00'}


def test_costs_are_compared_with_fp32() -> None:
    rows = {row.name: row for row in cost_rows(report_data())}
    assert rows['packed file (MiB)'].values == {'fp32': 8.0, 'stage2': 2.0}
    assert rows['bit operations (G)'].changes == {'stage1': '2.00x less', 'stage2': '8.00x less'}
    assert 'mean bits of activations' in rows
