# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The report's file and table."""

import json
from pathlib import Path

import pytest

from gplq_mm.analysis import format_start, format_table, read_json, report_table, write_json
from gplq_mm.analysis.report import bits_label

RECIPE = dict(activation=dict(num_bits=4), weight=dict(num_bits=3, qat=False))


def test_json_round_trip_and_absent_file(tmp_path: Path) -> None:
    path = tmp_path / 'report.json'
    assert read_json(path) == {}
    write_json(path, {'a': {'b': 1.5}})
    assert read_json(path) == {'a': {'b': 1.5}}
    assert [p.name for p in tmp_path.iterdir()] == ['report.json']


def test_a_failed_write_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / 'report.json'
    write_json(path, {'a': 1})
    with pytest.raises(TypeError):
        write_json(path, {'a': object()})
    monkeypatch.setattr('os.replace', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {'a': 2})
    assert json.loads(path.read_text()) == {'a': 1}


def test_titles_say_what_is_quantized() -> None:
    qat = dict(activation=dict(num_bits=4), weight=dict(num_bits=3, qat=True))
    assert bits_label(RECIPE, 'stage1') == 'W32A4'
    assert bits_label(qat, 'stage1') == 'W3A4'
    assert bits_label(qat, 'stage2') == 'W3A4'


def test_table_has_a_column_a_stage_and_a_row_a_metric() -> None:
    stage1 = {'metrics': {'bbox_mAP': 0.25, 'extra': 1e-5}, 'bops': 2.5e9, 'seconds': 3600.0}
    report = {
        'recipe': RECIPE,
        'fp32': {'metrics': {'bbox_mAP': 0.5}, 'model_bytes': 3 * 2**20},
        'stage1': stage1,
    }
    lines = report_table(report).splitlines()
    cells = [[c.strip() for c in line.strip('|').split('|')] for line in lines]
    assert cells[0] == ['', 'FP32', 'W32A4']
    assert cells[2:] == [
        ['bbox_mAP', '0.5', '0.25'],
        ['extra', '-', '1e-05'],
        ['size (MiB)', '3.00', '-'],
        ['BOPs (G)', '-', '2.50'],
        ['time (s)', '-', '3,600.00'],
        ['peak memory (MiB)', '-', '-'],
    ]
    assert len({len(line) for line in lines}) == 1


def test_table_has_the_figures_of_the_deployed_model_if_there_are_any() -> None:
    fp32 = {'metrics': {}, 'latency_ms': 80.0}
    stage2 = {'metrics': {}, 'latency_ms': 40.0, 'latency_ratio': 2.0, 'disk_bytes': 2**20}
    lines = report_table({'recipe': RECIPE, 'fp32': fp32, 'stage2': stage2}).splitlines()
    cells = [[c.strip() for c in line.strip('|').split('|')] for line in lines]
    assert cells[-3:] == [
        ['on disk (MiB)', '-', '1.00'],
        ['latency (ms)', '80.00', '40.00'],
        ['speed (x FP32)', '-', '2.00'],
    ]


def test_a_finished_runs_table_has_the_change_and_no_empty_metrics() -> None:
    fp32 = {'metrics': {'mAP': 0.5, 'mAP_s': -1.0, 'mAP_l': -1.0, 'a': 1}, 'seconds': 7.0}
    stage2 = {'metrics': {'mAP': 0.25, 'mAP_s': -1.0, 'mAP_l': 0.0}, 'seconds': 9.0}
    table = report_table({'recipe': RECIPE, 'fp32': fp32, 'stage2': stage2})
    cells = [[c.strip() for c in line.strip('|').split('|')] for line in table.splitlines()]
    assert cells[0] == ['', 'FP32', 'W3A4', 'W3A4 - FP32']
    assert cells[2:5] == [
        ['mAP', '0.5', '0.25', '-0.25'],
        ['mAP_l', '-', '0', '-'],
        ['a', '1', '-', '-'],
    ]
    assert ['time (s)', '-', '9.00', '-'] in cells  # of making the model, not of scoring it
    assert 'mAP_s' not in table


def test_a_table_of_titles_only() -> None:
    assert format_table(['', 'a'], []) == '|  | a |\n|--|---|'


def test_rules_of_roles_that_a_recipe_adds_make_the_bits_mixed() -> None:
    preset = {**RECIPE, 'rules': [dict(role='image', num_bits=8, optional=True)]}
    added = [*preset['rules'], dict(role='post_gelu', activation=dict(num_bits=6))]
    assert bits_label(preset, 'stage2') == 'W3A4'
    assert bits_label({**preset, 'rules': added}, 'stage2') == 'W3Amix'


def test_the_gates_line_of_a_detector_has_levels_and_scores() -> None:
    gate = dict(images=8, feature_error=0.2, levels=[0.1, 0.3], rpn_error=0.05, limit=0.5)
    line = 'feature error 0.2 (limit 0.5), by level 0.1, 0.3, RPN scores 0.05 on 8 training images'
    assert format_start(gate) == line


def test_rules_that_train_weights_on_their_grid_count_in_stage_1() -> None:
    rules = [dict(name='fc', weight=dict(qat=True, learn_scale=True))]
    labels = [bits_label({**RECIPE, 'rules': rules}, stage) for stage in ('stage1', 'stage2')]
    assert labels == ['WmixA4', 'W3A4']
    own = dict(activation=dict(num_bits=4), weight=dict(num_bits=3, qat=True))
    rules = [dict(name='fc', weight=dict(qat=False))]
    assert bits_label({**own, 'rules': rules}, 'stage1') == 'WmixA4'


@pytest.mark.parametrize('content', [b'{"fp32": ', b'\xff\xfe\x00', b'[1]', b''])
def test_a_damaged_report_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / 'r.json').write_bytes(content)
    with pytest.raises(ValueError, match='r.json .*remove it, and start again') as caught:
        read_json(tmp_path / 'r.json')
    assert '\n' not in str(caught.value)
