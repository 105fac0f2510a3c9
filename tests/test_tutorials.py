# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The code of `docs/start.md` and `docs/tutorials` runs, in this process, on small models.

Fences: `python` and `bash` are run in their order, one namespace and one folder a page; `shell` has
commands that install something or stand on another page too; `text` is what something printed.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gplq_mm.__main__
from tests.helpers import tiny_projects
from tests.helpers.tools import load_tool

for _package in ('mmdet', 'mmpretrain', 'timm', 'sklearn'):
    pytest.importorskip(_package)

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / 'docs'
TUTORIALS = sorted((DOCS / 'tutorials').glob('*.md'))
START = DOCS / 'start.md'
FENCE = re.compile(r'^```(\w+)\n(.*?)^```$', re.M | re.S)
INSTALLS = ('pip install', 'make ', 'git clone')
SMALLER = {
    'range(30)': 'range(5)',
    'range(20)': 'range(6)',
    'epochs=7': 'epochs=1',
    'order[:1440]': 'order[:480]',
    '(0, 1440, 32)': '(0, 480, 32)',
}
"""Replaced in Python blocks: fewer epochs and images."""
IMAGES = dict(train=4, val=2)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and code of the fences of a page."""
    return FENCE.findall(page.read_text(encoding='utf-8'))


def lines_of(page: Path, language: str) -> list[str]:
    """Commands of a page, comments left out."""
    code = '\n'.join(code for kind, code in blocks(page) if kind == language)
    lines = code.replace('\\\n', ' ').splitlines()
    return [' '.join(shlex.split(line, comments=True, posix=False)) for line in lines if line]


def run_line(line: str) -> None:
    """Run `python -m gplq_mm ...` or `python tools/X.py ...` in this process."""
    program, *words = shlex.split(line)
    assert program == 'python', line
    if words[:2] == ['-m', 'gplq_mm']:
        assert gplq_mm.__main__.main(words[2:]) == 0, line
    else:
        load_tool(re.fullmatch(r'tools/(\w+)\.py', words[0])[1]).main(words[1:])


def run_page(page: Path) -> dict[str, object]:
    """Run the fences of a page in the current folder; return what its Python left."""
    names: dict[str, object] = {}
    for language, code in blocks(page):
        if language == 'python':
            for large, small in SMALLER.items():
                code = code.replace(large, small)
            exec(compile(code, str(page), 'exec'), names)
        elif language == 'bash':
            for line in code.replace('\\\n', ' ').splitlines():
                run_line(line)
    return names


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Makes a small project, its float model as the tutorial names it, and enters its folder."""

    def make(kind: str, name: str) -> Path:
        from mmengine.config import Config
        from mmengine.registry import MODELS, init_default_scope

        for writer in ('make_shapes_coco', 'make_shapes_folder'):
            few = getattr(tiny_projects, writer)
            monkeypatch.setattr(tiny_projects, writer, lambda root, few=few: few(root, **IMAGES))
        monkeypatch.setattr('gplq_mm.cli.gplq_config.MOST_EPOCHS', 2)
        made = tiny_projects.make_project(tmp_path / 'project', kind)
        monkeypatch.chdir(made.root)
        shutil.copy(made.config, made.config.with_name(f'{name}.py'))
        shutil.copy(next(made.root.rglob('*.png')), 'image.png')
        cfg = Config.fromfile(made.config)
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model)
        model.init_weights()
        torch.save(dict(state_dict=model.state_dict(), meta={}), f'{name}.pth')
        return made.root

    return make


def test_start_makes_a_model_of_four_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(START)
    scores = re.findall(r'^(?:float|4 bits) ([\d.]+)$', capsys.readouterr().out, re.M)
    before, after = map(float, scores)
    assert before > 0.2  # 0.1 is chance
    assert after > before - 0.1
    assert (tmp_path / 'digits_w4a4.pth').stat().st_size < 80_000  # float: 351 kB


def test_any_torch_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    left = run_page(DOCS / 'tutorials' / 'any_torch_model.md')
    assert left['coverage'].kept_float == []
    assert len(left['coverage'].quantized['matmul']) == 4


def test_a_detector(project: Callable[[str, str], Path]) -> None:
    root = project('mask_rcnn_vit', 'my_detector')
    left = run_page(DOCS / 'tutorials' / 'detector.md')
    assert left['result'].pred_instances.scores.ndim == 1
    written = (root / 'configs/my_detector_w4a4.py').read_text()
    shown = [code for kind, code in blocks(DOCS / 'tutorials' / 'detector.md') if kind == 'text']
    for line in shown[0].splitlines():
        assert line in written, line
    check_report_page(json.loads((root / 'work/gplq_report.json').read_text()))


def test_a_classifier_its_algorithms_and_its_bits(project: Callable[[str, str], Path]) -> None:
    root = project('vit_classifier', 'my_classifier')
    run_page(DOCS / 'tutorials' / 'classifier.md')
    run_page(DOCS / 'tutorials' / 'weight_algorithms.md')
    run_page(DOCS / 'tutorials' / 'mixed_precision.md')
    check_report_page(json.loads((root / 'work/gplq_report.json').read_text()))
    rows = json.loads((root / 'ptq/gplq_stage2.json').read_text())
    assert len(rows if isinstance(rows, list) else rows['rows']) == 2
    for name in ('ptq/gplq_final_mse.pth', 'ptq3/gplq_final.pth', 'mixed/mixed_recipe.py'):
        assert (root / name).is_file(), name
    for name in re.findall(r'`(gplq_\w+\.\w+)`', (DOCS / 'tutorials/classifier.md').read_text()):
        assert (root / 'work' / name).is_file(), name


def check_report_page(report: dict) -> None:
    """Every key of a run's report is in `docs/reference/files.md`."""
    text = (DOCS / 'reference' / 'files.md').read_text(encoding='utf-8')
    known = set(re.findall(r'`([\w.]+)`', text))
    nested = ('calibration', 'coverage')
    keys = {key for key in report if key not in nested}
    keys |= {f'{part}.{key}' for part in nested for key in report[part]}
    keys |= {key for stage in ('fp32', 'stage1', 'stage2') for key in report[stage]}
    keys |= {*report['calibration']['gate'], *report['stage2']['weights']} - {'layers'}
    assert not keys - known, f'add to docs/reference/files.md: {sorted(keys - known)}'


def test_commands_that_are_not_run_here_install_or_stand_on_a_tutorial() -> None:
    run = {line for page in TUTORIALS for line in lines_of(page, 'bash')}
    for page in (START, *TUTORIALS):
        for line in lines_of(page, 'shell'):
            assert line in run or line.startswith(INSTALLS), f'{page.name}: {line} is run nowhere'
        assert {kind for kind, _ in blocks(page)} <= {'python', 'bash', 'shell', 'text'}


@pytest.mark.parametrize('page', [START, *TUTORIALS], ids=lambda page: page.stem)
def test_a_tutorial_fits_on_a_page(page: Path) -> None:
    assert len(page.read_text(encoding='utf-8').splitlines()) <= 100
