# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The comparison of two revisions finds a change of one bit, and nothing where there is none."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'tools/dev'))

import compare_revisions
from compare_revisions import compare, table
from revisions.differences import LEFT_OUT, Comparison
from revisions.jobs import JOBS, Job
from revisions.running import git

ROOT = Path(__file__).resolve().parents[2]
TRAINING = Job('training', (), 'project', ('run/final.pth#scales', 'run/final.pth', 'run/*.json'))


def found(old: Any, new: Any, **options: Any) -> list[str]:
    return [str(difference) for difference in Comparison(**options).differences(old, new)]


def next_up(tensor: Tensor, index: tuple[int, ...]) -> Tensor:
    """The tensor with one element a unit in the last place larger."""
    changed = tensor.clone()
    changed[index] = torch.nextafter(changed[index], torch.tensor(float('inf')))
    return changed


def test_a_unit_in_the_last_place_is_found_and_located() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert found({'a': [x]}, {'a': [x.clone()]}) == []
    where = found({'a': [x]}, {'a': [next_up(x, (1, 2))]})
    assert where == ['a > 0 > (1, 2): 5.0 != 5.000000476837158']
    assert found(0.1, float(np.nextafter(0.1, 1))) == ['root: 0.1 != 0.10000000000000002']


@pytest.mark.parametrize(
    ('old', 'new', 'difference'),
    [
        (torch.tensor(0.0), torch.tensor(-0.0), '(): 0.0 != -0.0'),
        (torch.tensor([1, 2]), torch.tensor([2, 3]), '(0,) and 1 more of 2: 1 != 2'),
        (torch.zeros(2), torch.zeros(2).double(), 'dtype and shape: torch.float32 (2,) != '),
        (torch.zeros(2), torch.zeros(1, 2), 'dtype and shape: torch.float32 (2,) != torch.float32'),
        (np.zeros(3), np.ones(3), '(0,) and 2 more of 3: 0.0 != 1.0'),
        ({'a': 1, 'b': 2}, {'b': 2, 'a': 1}, "key number 0: 'a' != 'b'"),
        ({'a': 1}, {}, 'a: present != missing'),
        ({}, {'a': 1}, 'a: missing != present'),
        ([1], [1, 2], 'length: 1 != 2'),
        (1, 1.0, 'root: int 1 != float 1.0'),
        (0.0, -0.0, 'root: 0.0 != -0.0'),
        ('a\nb', 'a\nc', "1: 'b' != 'c'"),
        (b'1', b'2', "root: b'1' != b'2'"),
    ],
)
def test_what_counts_as_a_difference(old: Any, new: Any, difference: str) -> None:
    differences = found(old, new)
    assert len(differences) == 1
    assert differences[0].startswith(difference)


def test_equal_bits_are_equal() -> None:
    nan = float('nan')
    old = {'t': torch.tensor([nan, 1.0]), 'f': nan, 'e': torch.zeros(0, 3)}
    new = {'t': torch.tensor([nan, 1.0]), 'f': float('nan'), 'e': torch.zeros(0, 3)}
    assert found(old, new) == []
    assert found(torch.ones(2, 2).T, torch.ones(2, 2)) == []


def test_keys_are_left_out_by_name_or_with_their_parent() -> None:
    old = {'seconds': 1.0, 'float_checkpoint': {'path': 'a', 'sha256': 'x'}, 'path': 'kept'}
    new = {'float_checkpoint': {'path': 'b', 'sha256': 'x'}, 'path': 'other'}
    assert found(old, new) == ["path: 'kept' != 'other'"]
    assert found(old, new, ignored=['path']) == []
    assert all(LEFT_OUT.values())


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Results of two revisions that differ in timing alone."""
    run = tmp_path / 'old' / 'project' / 'run'
    run.mkdir(parents=True)
    state = {'head.weight': torch.randn(3, 4), 'head.input_quantizer.scale': torch.rand(4)}
    torch.save({'meta': {'time': 'one'}, 'state_dict': state}, run / 'final.pth')
    report = {'stage1': {'seconds': 1.5, 'latency_ms': 1.5, 'metrics': {'accuracy/top1': 62.5}}}
    (run / 'gplq_report.json').write_text(json.dumps(report))
    shutil.copytree(tmp_path / 'old', tmp_path / 'new')
    torch.save({'meta': {'time': 'two'}, 'state_dict': state}, tmp_path / FINAL)
    report['stage1'].update(seconds=2.5, latency_ms=3.5)
    (tmp_path / 'new/project/run/gplq_report.json').write_text(json.dumps(report))
    return tmp_path / 'old', tmp_path / 'new'


FINAL = 'new/project/run/final.pth'


def results(folders: tuple[Path, Path], *failures: dict[str, str]) -> list[str]:
    rows = compare([TRAINING], folders, *([failures] if failures else []))
    return [row.cells()[2] for row in rows]


def test_timing_alone_is_no_difference(folders: tuple[Path, Path]) -> None:
    assert results(folders) == [f'equal ({number} values)' for number in (1, 2, 1)]


@pytest.mark.parametrize('key', ['head.weight', 'head.input_quantizer.scale'])
def test_one_bit_in_a_result_file_is_reported(folders: tuple[Path, Path], key: str) -> None:
    path = folders[0].parent / FINAL
    content = torch.load(path, weights_only=True)
    value = content['state_dict'][key]
    index = (2,) * value.dim()
    content['state_dict'][key] = next_up(value, index)
    torch.save(content, path)
    scales, checkpoint, report = results(folders)
    assert f'DIFFERENT: state_dict > {key} > {index}: {value[index].item()} != ' in checkpoint
    assert ('DIFFERENT' in scales) is key.endswith('scale')
    assert report.startswith('equal')


def test_a_score_in_a_report_is_reported(folders: tuple[Path, Path]) -> None:
    path = folders[1] / 'project/run/gplq_report.json'
    path.write_text(path.read_text().replace('62.5', '62.50000000000001'))
    expected = 'DIFFERENT: stage1 > metrics > accuracy/top1: 62.5 != 62.50000000000001'
    assert results(folders)[2] == expected


def test_a_missing_file_or_a_failed_job_is_a_difference(folders: tuple[Path, Path]) -> None:
    (folders[0].parent / FINAL).unlink()
    assert 'DIFFERENT: run/final.pth, one expected: 1 files != 0 files' in results(folders)
    for failures in (({}, {'training': 'exit code 1'}), ({'training': 'x'}, {'training': 'x'})):
        assert results(folders, *failures)[0].startswith('DIFFERENT: outcome')


def test_the_table_may_list_every_difference(folders: tuple[Path, Path]) -> None:
    path = folders[1] / 'project/run/gplq_report.json'
    path.write_text('{"stage1": {"metrics": {"a": 1}}, "b": 2}')
    rows = compare([TRAINING], folders)
    assert table(rows).endswith('(and 2 more)')
    assert table(rows, every=True).count('training *.json: ') == 3


def test_jobs_read_what_other_jobs_write() -> None:
    names = [job.name for job in JOBS]
    assert len(set(names)) == len(names)
    assert all(not job.needs or names.index(job.needs) < i for i, job in enumerate(JOBS))
    chosen = [job.name for job in compare_revisions.chosen_jobs(['vit-ptq'])]
    assert chosen == ['vit-fused', 'vit-ptq']


@pytest.mark.skipif(not (ROOT / '.git').exists(), reason='no git repository')
def test_a_revision_equals_itself(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ['HEAD', 'HEAD', '--jobs', 'recipes', '--keep', str(tmp_path / 'kept')]
    assert compare_revisions.main(words) == 0
    assert capsys.readouterr().out.endswith('all equal\n')
    assert (tmp_path / 'kept/new/recipes/recipes.json').is_file()
    assert str(tmp_path) not in git('worktree', 'list')


@pytest.mark.skipif(not (ROOT / '.git').exists(), reason='no git repository')
def test_an_unknown_revision_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_revisions.main(['no_such_revision', '--jobs', 'recipes']) == 2
    message = capsys.readouterr().err
    assert message.startswith('error: git worktree add') and 'no_such_revision' in message
    assert message.count('\n') == 1
