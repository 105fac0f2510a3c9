# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The model zoo: metafiles in mmpretrain's form, one entry per config, a page written from them."""

import ast
import json
import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.tiny_projects import REPOSITORY

with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(str(REPOSITORY / 'tools/zoo'))
    make_row, page = (import_module(name) for name in ('make_row', 'write_models_page'))
CONFIGS = sorted(
    path for path in (REPOSITORY / 'configs/gplq').glob('*.py') if '_transfer' not in path.stem
)
FLOAT = re.compile(r'Float[^:]*: ([\d.]+)(?: top-1| mIoU| box / ([\d.]+) mask AP)')
REPORT = dict(
    recipe=dict(name='w4a4', scope='all', activation=dict(num_bits=4), weight=dict(num_bits=4)),
    seed=0,
    fp32=dict(metrics={'accuracy/top1': 90.0}, model_bytes=800, latency_ms=20.0),
    stage2=dict(metrics={'accuracy/top1': 89.5}, model_bytes=110, latency_ms=10.0, disk_bytes=120),
)


@cache
def entries(path: str) -> dict[str, dict[str, Any]]:
    models = yaml.safe_load((REPOSITORY / path).read_text(encoding='utf-8'))['Models']
    names = [model['Name'] for model in models]
    assert len(names) == len(set(names)), f'{path} has an entry twice'
    return dict(zip(names, models, strict=True))


def test_the_index_has_the_form_of_modelindex() -> None:
    modelindex = pytest.importorskip('modelindex.load_model_index')
    index = modelindex.load(str(REPOSITORY / 'model-index.yml'))
    index.build_models_with_collections()
    assert not index.check_errors
    models = list(index.models)
    assert len(models) == len(CONFIGS) + 1
    assert all((REPOSITORY / model.config).is_file() for model in models)
    assert {model.in_collection for model in models} == {'GPLQ'}


def test_every_config_has_its_entry() -> None:
    found = entries('configs/gplq/metafile.yml')
    assert list(found) == [path.stem for path in CONFIGS]
    for path in CONFIGS:
        about = found[path.stem]['Metadata']
        assert about.get('FP32 Checkpoint') == load_from(path), path.stem


def load_from(path: Path) -> str | None:
    """`load_from` of a config or of the config of this folder that it builds on."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    pairs = [(n.targets[0].id, n.value) for n in tree.body if isinstance(n, ast.Assign)]
    values = {name: v.value for name, v in pairs if isinstance(v, ast.Constant)}
    if 'load_from' in values:
        return values['load_from']
    base = values.get('_base_')
    return load_from(path.parent / base) if base else None


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_the_float_figures_are_those_of_the_config(path: Path) -> None:
    text = ' '.join(path.read_text(encoding='utf-8').replace('\n#', '').splitlines())
    found = FLOAT.search(text)
    results = entries('configs/gplq/metafile.yml')[path.stem].get('Results', [])
    scores = [v for r in results for name, v in r['Metrics'].items() if name.startswith('FP32 ')]
    if found:
        assert scores == [float(number) for number in found.groups() if number]
    else:
        assert 'Float' not in text


def test_the_page_and_the_measured_rows_are_up_to_date(tmp_path: Path) -> None:
    copy = tmp_path / 'metafile.yml'
    copy.write_text(page.MEASURED.read_text(encoding='utf-8'), encoding='utf-8')
    page.update_measured(copy)
    command = 'run: python tools/zoo/write_models_page.py'
    assert copy.read_text(encoding='utf-8') == page.MEASURED.read_text(encoding='utf-8'), command
    assert page.PAGE.read_text(encoding='utf-8') == page.render(), command


def test_a_row_from_a_work_dir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'gplq_report.json').write_text(json.dumps(REPORT))
    words = ['--config', 'configs/x_w4a4.py', '--dataset', 'Flowers', '--date', '2026-01-02']
    assert make_row.main([str(tmp_path), *words]) == 0
    (row,) = yaml.safe_load(capsys.readouterr().out)
    assert (row['Name'], row['Config']) == ('x_w4a4', 'configs/x_w4a4.py')
    metrics = {'Top 1 Accuracy': 89.5, 'FP32 Top 1 Accuracy': 90.0}
    expected = {'Task': 'Image Classification', 'Dataset': 'Flowers', 'Metrics': metrics}
    assert row['Results'] == [expected]
    about = row['Metadata']
    assert (about['Bits'], about['Model Bytes'], about['Packed File Bytes']) == ('W4A4', 110, 120)
    assert (about['FP32 Latency (ms)'], about['Latency (ms)']) == (20.0, 10.0)
    assert about['Command'] == 'python tools/train.py configs/x_w4a4.py'
    metafile = tmp_path / 'metafile.yml'
    for dataset in ('Flowers', 'Birds'):  # the second replaces the first
        words[3] = dataset
        assert make_row.main([str(tmp_path), *words, '--metafile', str(metafile)]) == 0
    (stored,) = page.read_models(metafile)
    assert stored['Results'][0]['Dataset'] == 'Birds'
    assert page.is_measured(stored)
    assert '| `x_w4a4` | Birds | W4A4 | Top 1 Accuracy | 90 | 89.5 |' in page.measured_table(
        [stored]
    )


def test_an_unfinished_run_and_a_missing_report_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path), '--config', 'x.py', '--dataset', 'Flowers']
    assert make_row.main(words) == 2
    assert 'no report at' in capsys.readouterr().err
    (tmp_path / 'gplq_report.json').write_text(json.dumps({**REPORT, 'stage2': {}}))
    assert make_row.main(words) == 2
    assert 'a row needs one of' in capsys.readouterr().err
