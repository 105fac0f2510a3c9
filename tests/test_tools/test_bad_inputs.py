# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Mistakes of users: each ends in one line that names what was given and what to write instead."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gplq_mm.integrations.mm.launch.tools import USER_ERROR, run_tool
from tests.helpers.gplq_runs import write_gplq_config
from tests.helpers.tiny_projects import TinyProject, make_project
from tests.helpers.tools import load_tool

pytest.importorskip('mmpretrain')
train, test, ptq, deploy = (load_tool(name) for name in ('train', 'test', 'ptq', 'deploy'))
GPLQ = 'configs/gplq.py'


@pytest.fixture(scope='module')
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """The classifier project with a GPLQ config and a checkpoint of another model."""
    project = make_project(tmp_path_factory.mktemp('made'), 'vit_classifier')
    for split in ('train', 'val'):  # two images are enough
        for path in (project.root / 'data' / 'shapes_folder' / split).rglob('*.png'):
            if path.stem not in ('0', '1'):
                path.unlink()
    torch.save({'state_dict': {'x': torch.ones(3)}}, project.root / 'fp32.pth')
    write_gplq_config(project, Path('fp32.pth'))
    return project


@pytest.fixture
def project(made: TinyProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil; the current folder."""
    root = tmp_path / 'project'
    shutil.copytree(made.root, root)
    monkeypatch.chdir(root)
    return root


def last_line(capfd: pytest.CaptureFixture[str]) -> str:
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines
    assert not any('Traceback' in line for line in lines)
    return lines[-1]


def refuse(tool: object, words: str, capfd: pytest.CaptureFixture[str]) -> str:
    """Run a tool on bad input; return its one line."""
    assert run_tool(lambda: tool.main(words.split())) == USER_ERROR  # type: ignore[attr-defined]
    line = last_line(capfd)
    assert line.startswith('error: ')
    return line


OPTIONS = [
    ('abc', r"'abc' is no setting; write key=value"),
    ('=abc', 'write key=value'),
    ('model=None', r'gplq\.py has no model; write model=dict'),
    ('model=abc', "model='abc' .*: write a dict"),
    ('model.recipe.activaton.num_bits=4', "did you mean 'activation'"),
    ('model.recipe=w4', 'write one of .*w4a4'),
    ('model.recipe.calibration.seed=abc', r"calibration\.seed='abc': write an integer"),
    ('model.recipe.activation.num_bits=40', r'activation\.num_bits=40: write an integer'),
    ('randomness=5', 'randomness=5 .*: write a dict'),
    ('randomness.seed=abc', "seed='abc' .*: write an integer from 0 to 4294967295 or None"),
    ('randomness.seed=-1', 'seed=-1 .*: write an integer from 0'),
    ('randomness.seed=1.5', r'seed=1\.5 .*: write an integer from 0'),
    ('train_dataloader.batch_size=0', 'batch_size=0 .*: write an integer from 1'),
    ('val_dataloader.batch_size=0', r'val_dataloader\.batch_size=0'),
    ('train_dataloader.batch_size=abc', "batch_size='abc'"),
    ('train_dataloader.num_workers=-1', 'num_workers=-1 .*: write an integer from 0'),
    ('train_cfg.max_epochs=0', 'max_epochs=0 .*: write an integer from 1'),
    ('train_cfg.max_epochs=-1', 'max_epochs=-1'),
    ('train_cfg.max_epochs=abc', "max_epochs='abc'"),
    ('train_cfg.val_interval=0', 'val_interval=0'),
    ('optim_wrapper.accumulative_counts=0', 'accumulative_counts=0'),
    ('train_cfg=None', 'has no train_cfg: write it, as train_dataloader and optim_wrapper need'),
    ('train_dataloader=None', 'has no train_dataloader'),
    ('val_dataloader=None', 'has no val_dataloader: write it, as val_cfg and val_evaluator need'),
    ('optim_wrapper=None', 'has no optim_wrapper'),
    ('optim_wrapper=adam', "optim_wrapper='adam' .*: write a dict"),
    ('custom_hooks=None', r"no GPLQHook, .* write custom_hooks=\[dict\(type='gplq_mm\.GPLQHook'"),
    ('custom_hooks=abc', "custom_hooks='abc' .*: write a list"),
    ('load_from=None', r'load_from is empty; .*load_from=PATH_OR_URL'),
    ('load_from=5', '5 is no checkpoint; write a path'),
    ('load_from=nowhere.pth', r'no checkpoint at .*nowhere\.pth'),
    ('load_from=configs', 'no checkpoint at .*configs'),
    ('load_from=configs/gplq.py', r'gplq\.py cannot be read as a checkpoint'),
    ('load_from=https://127.0.0.1:9/x.pth', r'cannot download https://127\.0\.0\.1:9/x\.pth'),
    ('load_from=file:///nowhere/x.pth', 'cannot download file:///nowhere/x.pth'),
    ('data_root=/nowhere', 'data not found: /nowhere'),
    ('train_dataloader.dataset.data_root=nowhere/', 'nowhere'),
]


@pytest.mark.parametrize(('option', 'says'), OPTIONS, ids=[option for option, _ in OPTIONS])
def test_a_setting_that_no_run_can_have(
    project: Path, capfd: pytest.CaptureFixture[str], option: str, says: str
) -> None:
    words = f'{GPLQ} --work-dir w --cfg-options {option}'
    if says.endswith('write key=value'):  # argparse ends the program itself
        with pytest.raises(SystemExit) as ended:
            train.main(words.split())
        assert ended.value.code == USER_ERROR
        line = last_line(capfd)
    else:
        line = refuse(train, words, capfd)
    assert re.search(says, line), line
    assert not (project / 'w').exists(), 'the mistake was found after the start-up'


CONFIGS = [
    ('x.py', b'', r'x\.py has no model'),
    ('x.py', b'model = dict(\n', r"x\.py cannot be read: SyntaxError: '\(' was never closed"),
    ('x.py', b'a = 1\nx = 1 / 0\n', r'ZeroDivisionError: division by zero \(line 2: x = 1 / 0\)'),
    ('x.py', b'x = nothing\n', "NameError: name 'nothing' is not defined"),
    ('x.py', b'\xff\xfe\x00', 'UnicodeDecodeError'),
    ('x.py', b"_base_ = './gone.py'", 'builds on a config that does not exist'),
    ('x.py', b"_base_ = './gplq.py'\nmodel = dict(recipe=dict(optim=3))", 'optim=3: write a dict'),
    ('x.py', b"_base_ = './gplq.py'\nload_from = dict(a=1)", 'load_from is a dict in the child'),
    ('x.txt', b'a', 'Only py/yml/yaml/json type are supported'),
    ('x.json', b'{a', 'JSONDecodeError'),
]


@pytest.mark.parametrize(('name', 'content', 'says'), CONFIGS, ids=[c[2] for c in CONFIGS])
def test_a_config_that_cannot_be_read(
    project: Path, capfd: pytest.CaptureFixture[str], name: str, content: bytes, says: str
) -> None:
    (project / 'configs' / name).write_bytes(content)
    line = refuse(train, f'configs/{name} --work-dir w', capfd)
    assert re.search(says, line), line
    assert not (project / 'w').exists()


WORDS = [
    (train, 'nowhere.py', r'no config at .*nowhere\.py'),
    (train, f'{GPLQ} --resume nowhere.pth', r'--resume: no checkpoint at .*nowhere\.pth'),
    (train, f'{GPLQ} --auto-scale-lr', r'auto_scale_lr\.base_batch_size=16'),
    (test, f'{GPLQ} nowhere.pth', r'no checkpoint at .*nowhere\.pth'),
    (test, f'{GPLQ} {GPLQ}', r'gplq\.py cannot be read as a checkpoint'),
    (test, f'{GPLQ} fp32.pth --out x.txt', r'--out x\.txt: pred go into a file'),
    (test, f'{GPLQ} fp32.pth --heads y.pth', '--heads has no effect'),
    (ptq, 'configs/vit_classifier.py fp32.pth', r'has no model of type gplq_mm\.GPLQ'),
    (ptq, f'{GPLQ} fp32.pth --ptq gptqq', '--ptq gptqq: .*did you mean|--ptq gptqq: .*gptq'),
    (ptq, f'{GPLQ} fp32.pth --bits 9', '--bits 9: write a number from 2 to 8'),
    (ptq, f'{GPLQ} fp32.pth --ptq mse gptq --out x.pth', '--out names one file'),
]


@pytest.mark.parametrize(('tool', 'words', 'says'), WORDS, ids=[words for _, words, _ in WORDS])
def test_words_that_fit_no_run(
    project: Path, capfd: pytest.CaptureFixture[str], tool: object, words: str, says: str
) -> None:
    line = refuse(tool, f'{words} --work-dir w', capfd)
    assert re.search(says, line), line
    assert not (project / 'w').exists()


def no_images(root: Path) -> None:
    for path in (root / 'data').rglob('*.png'):
        path.unlink()


def file_for_a_folder(root: Path) -> None:
    (root / 'w').write_text('')


def unknown_data_set(root: Path) -> None:
    text = "train_dataloader = dict(dataset=dict(type='Nowhere'))\n"
    (root / GPLQ).write_text((root / GPLQ).read_text() + text)


STARTED: list[tuple[Callable[[Path], None], str]] = [
    (file_for_a_folder, 'nothing can be written to the work dir .*/w: File exists; .*--work-dir'),
    (unknown_data_set, 'Nowhere is not in the mmpretrain::dataset registry'),
    (no_images, 'has no images: .*train'),
]


@pytest.mark.parametrize(('spoil', 'says'), STARTED, ids=[spoil.__name__ for spoil, _ in STARTED])
def test_what_only_the_start_shows(
    project: Path, capfd: pytest.CaptureFixture[str], spoil: Callable[[Path], None], says: str
) -> None:
    spoil(project)
    line = refuse(train, f'{GPLQ} --work-dir w', capfd)
    assert re.search(says, line), line
