# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The logic of the set-up; nothing is installed here."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.dev import setup_env
from tools.dev.setup_env import Environment, Step, library_lines, make_steps, pinned

ROOT = Path(__file__).resolve().parents[2]


def make_environment(folder: Path) -> Environment:
    """An environment of which only the Python exists."""
    environment = Environment(folder / 'venv')
    environment.python.parent.mkdir(parents=True)
    environment.python.symlink_to(sys.executable)
    return environment


class FakeEnvironment(Environment):
    """Answers from a list whether mmcv fits, and writes down what would run."""

    def __init__(self, folder: Path, fits: list[bool], log: str = '') -> None:
        super().__init__(folder)
        self.fits, self.log_text = fits, log
        self.commands: list[list[str]] = []
        self.environs: list[dict[str, str]] = []

    def mmcv_fits(self) -> bool:
        return self.fits.pop(0)

    def run(self, command: list[str], environ: dict[str, str] | None = None) -> None:
        self.commands.append(command)
        self.environs.append(environ or {})

    def read_log(self) -> str:
        return self.log_text


def test_mmcv_is_compiled_by_the_launcher(tmp_path: Path) -> None:
    environment = FakeEnvironment(tmp_path, [True])
    environment.compile_mmcv()
    assert len(environment.commands) == 1
    assert environment.commands[0][-1] == pinned('mmcv')[0]
    assert '--no-build-isolation' in environment.commands[0]
    assert Path(environment.environs[0]['CXX']).name == 'c++'
    assert environment.environs[0]['CFLAGS'].endswith('-g0')


def test_cached_wheel_that_does_not_work_is_compiled_anew(tmp_path: Path) -> None:
    log = 'Using cached mmcv-2.1.0-cp311-cp311-linux_x86_64.whl'
    environment = FakeEnvironment(tmp_path, [False, True], log)
    environment.pip = [sys.executable, '-c', 'pass']  # deletes nothing from the real cache
    environment.compile_mmcv()
    assert ['--force-reinstall' in command for command in environment.commands] == [False, True]


def test_fresh_build_that_does_not_work_is_an_error(tmp_path: Path) -> None:
    log = 'Building wheel for mmcv (pyproject.toml): finished'
    environment = FakeEnvironment(tmp_path, [False, False], log)
    with pytest.raises(SystemExit, match='compiled, but this does not run'):
        environment.compile_mmcv()
    assert len(environment.commands) == 1


def test_only_undone_steps_run_and_the_stamp_ends_later_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    environment = make_environment(tmp_path)
    done: list[str] = []
    steps = (
        Step('first', [], lambda: done.append('first'), lambda: True),
        Step('second', [], lambda: done.append('second')),
    )
    monkeypatch.setattr(environment, 'mmcv_fits', lambda: True)
    monkeypatch.setattr(setup_env, 'EVERYTHING_WORKS', 'pass')
    setup_env.build(environment, steps)
    assert done == ['second']
    assert '[1/2] first: there\n[2/2] second ...' in capsys.readouterr().out
    assert environment.is_current()
    environment.python.unlink()
    assert not environment.is_current()


def test_environment_that_does_not_work_gets_no_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = make_environment(tmp_path)
    monkeypatch.setattr(environment, 'mmcv_fits', lambda: True)
    monkeypatch.setattr(setup_env, 'EVERYTHING_WORKS', 'raise ImportError')
    with pytest.raises(SystemExit, match='raise ImportError'):
        setup_env.build(environment, ())
    assert not environment.is_current()


def test_stamp_follows_the_requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / 'requirements', tmp_path / 'requirements')
    monkeypatch.setattr(setup_env, 'ROOT', tmp_path)
    environment = make_environment(tmp_path)
    before = environment.digest()
    assert environment.digest() == before
    with (tmp_path / 'requirements' / 'lint.txt').open('a', encoding='utf-8') as file:
        file.write('another\n')
    assert environment.digest() != before


def test_second_run_takes_less_than_two_seconds(tmp_path: Path) -> None:
    environment = make_environment(tmp_path)
    environment.stamp.write_text(environment.digest(), encoding='utf-8')
    command = [sys.executable, str(ROOT / 'tools/dev/setup_env.py'), '--venv', environment.venv]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    assert time.monotonic() - start < 2
    assert (done.returncode, done.stdout) == (0, '')


def test_dry_run_prints_the_steps_and_touches_nothing(tmp_path: Path, capsys) -> None:
    assert setup_env.main(['--venv', str(tmp_path / 'new'), '--dry-run']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:5] for line in lines[::2]] == [f'[{n}/4]' for n in range(1, 5)]
    assert all(line.endswith(': to do') for line in lines[::2])
    assert 'torch==' in lines[3]
    assert lines[5].endswith(pinned('mmcv')[0])
    assert not (tmp_path / 'new').exists()


def test_incomplete_distributions_are_forgotten(tmp_path: Path) -> None:
    for name, is_complete in (('whole', True), ('half', False)):
        info = tmp_path / f'{name}-1.0.dist-info'
        info.mkdir()
        (tmp_path / f'{name}.py').write_text('')
        (info / 'METADATA').write_text(f'Name: {name}\nVersion: 1.0\n')
        (info / 'INSTALLER').write_text('uv')
        record = f'{name}.py,,\n{name}.pyc,,\n{info.name}/METADATA,,\n'
        (info / 'RECORD').write_text(record if is_complete else f'{record}lost.py,,\n')
    here = f'import sysconfig; sysconfig.get_path = lambda name: {str(tmp_path)!r}\n'
    environment = Environment(Path(sys.prefix))
    assert environment.ask(here + setup_env.FORGET_INCOMPLETE) == 'half-1.0\n'
    assert not (tmp_path / 'half-1.0.dist-info').exists()
    assert (tmp_path / 'whole-1.0.dist-info').exists()


def test_ask_tells_failure_from_silence(tmp_path: Path) -> None:
    environment = make_environment(tmp_path)
    assert environment.ask('pass') == ''
    assert environment.ask('raise AssertionError') is None
    assert Environment(tmp_path / 'nowhere').ask('pass') is None


def test_libraries_are_pinned_and_listed_once(tmp_path: Path) -> None:
    names = [setup_env.distribution_name(line) for line in library_lines(Environment(tmp_path))]
    assert len(set(names)) == len(names)
    assert {'torch', 'torchvision', 'mmdet', 'onnx', 'ruff'} <= set(names)
    assert 'mmcv' not in names
    assert pinned('wheel') == ('wheel',)


def test_installed_successor_of_a_library_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = Environment(tmp_path)
    monkeypatch.setattr(environment, 'has', lambda name: name == 'onedl-mmdetection')
    names = [setup_env.distribution_name(line) for line in library_lines(environment)]
    assert 'mmdet' not in names
    assert 'mmpretrain' in names


def test_steps_end_with_the_package_itself(tmp_path: Path) -> None:
    steps = make_steps(Environment(tmp_path))
    assert steps[-1].command[-2:] == ['-e', str(ROOT)]
    assert [step.is_done() for step in steps] == [False] * 4


@pytest.mark.parametrize(
    ('sees_cuda', 'has_nvcc', 'forced'),
    [('1', True, '1'), ('1', False, '0'), ('0', True, '0'), ('0', False, '0')],
)
def test_cuda_operators_need_torch_and_nvcc(
    sees_cuda: str, has_nvcc: bool, forced: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = Environment(tmp_path)
    monkeypatch.setenv('CUDA_HOME', str(tmp_path))
    monkeypatch.setattr(environment, 'ask', lambda code: f'{sees_cuda}\n')
    monkeypatch.setattr(shutil, 'which', lambda name: '/bin/nvcc' if has_nvcc else None)
    environ = setup_env.mmcv_environ(environment)
    assert environ['FORCE_CUDA'] == forced
    assert environ['MMCV_WITH_OPS'] == '1'
    assert ('CUDA_VISIBLE_DEVICES' in environ) is (forced == '0')
