# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The logic of the set-up; nothing is installed here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.dev import setup_env
from tools.dev.setup_env import Environment, Step, make_steps, pinned

ROOT = Path(__file__).resolve().parents[2]


def make_environment(folder: Path) -> Environment:
    """An environment of which only the Python exists."""
    environment = Environment(folder / 'venv')
    environment.python.parent.mkdir(parents=True)
    environment.python.symlink_to(sys.executable)
    return environment


class FakeEnvironment(Environment):
    """Answers from lists, and writes down what would run."""

    def __init__(self, folder: Path, works: list[bool], unmet: str, log: str = '') -> None:
        super().__init__(folder)
        self.answers, self.unmet_text, self.log_text = works, unmet, log
        self.commands: list[list[str]] = []
        self.forgotten = 0

    def works(self, step: Step) -> bool:
        return self.answers.pop(0)

    def unmet(self, step: Step) -> str:
        return self.unmet_text

    def run(self, command: list[str], environ: dict[str, str] | None = None) -> None:
        self.commands.append(command)

    def forget_wheels(self, step: Step) -> None:
        self.forgotten += 1

    def repair_opencv(self) -> None:
        pass

    def read_log(self) -> str:
        return self.log_text


STEP = Step('a step', ('mmcv==2.1.0',), 'pass')


def test_install_of_what_is_missing(tmp_path: Path) -> None:
    environment = FakeEnvironment(tmp_path, [True, True], unmet='mmcv==2.1.0')
    environment.install(STEP)
    assert len(environment.commands) == 1
    assert environment.commands[0][-1] == 'mmcv==2.1.0'
    assert '--force-reinstall' not in environment.commands[0]
    assert environment.forgotten == 0


def test_what_is_there_and_broken_is_replaced(tmp_path: Path) -> None:
    environment = FakeEnvironment(tmp_path, [True, True], unmet='')
    environment.install(STEP)
    assert '--force-reinstall' in environment.commands[0]
    assert environment.forgotten == 1


def test_kept_wheel_that_does_not_load_is_built_anew(tmp_path: Path) -> None:
    log = 'Using cached mmcv-2.1.0-cp311-cp311-linux_x86_64.whl'
    environment = FakeEnvironment(tmp_path, [False, True], 'mmcv==2.1.0', log)
    environment.install(STEP)
    assert len(environment.commands) == 2
    assert '--force-reinstall' in environment.commands[1]
    assert environment.forgotten == 1


def test_fresh_build_that_does_not_load_is_an_error(tmp_path: Path) -> None:
    log = 'Building wheel for mmcv (pyproject.toml): finished'
    environment = FakeEnvironment(tmp_path, [False, False], 'mmcv==2.1.0', log)
    with pytest.raises(SystemExit, match='installed, but this does not run'):
        environment.install(STEP)
    assert len(environment.commands) == 1


@pytest.mark.parametrize(
    ('adopt', 'unmet', 'works', 'done'),
    [
        (False, '', True, True),
        (False, '', False, False),
        (False, 'mmcv==2.1.0', True, False),
        (True, 'mmcv==2.1.0', True, True),  # another mmcv that fits is taken as it is
        (True, '', False, False),
    ],
)
def test_is_done(tmp_path: Path, adopt: bool, unmet: str, works: bool, done: bool) -> None:
    step = Step('a step', ('mmcv==2.1.0',), 'pass', adopt=adopt)
    assert FakeEnvironment(tmp_path, [works], unmet).is_done(step) is done


def test_own_package_is_installed_again_whenever_the_stamp_is_stale(tmp_path: Path) -> None:
    *others, own = make_steps()
    assert own.requirements == ('gplq-mm',)
    assert own.repeat
    assert not any(step.repeat for step in others)
    assert not FakeEnvironment(tmp_path, [True], unmet='').is_done(own)


def test_only_undone_steps_run_and_the_stamp_ends_later_runs(tmp_path: Path, capsys) -> None:
    steps = (
        Step('first', ('pip>=1',), 'pass'),
        Step('second', ('no-such-distribution',), 'open("../flag")'),
    )
    environment = make_environment(tmp_path)
    installed = []
    environment.install = installed.append
    setup_env.build(environment, steps)
    assert [step.title for step in installed] == ['second']
    assert '[1/2] first: there\n[2/2] second ...' in capsys.readouterr().out
    assert environment.is_current()
    environment.python.unlink()
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
    assert [line[:5] for line in lines[::2]] == [f'[{n}/7]' for n in range(1, 8)]
    assert all(line.endswith(': to do') for line in lines[::2])
    assert '-v --no-build-isolation mmcv==' in lines[5]
    assert not (tmp_path / 'new').exists()


def test_unmet_requirements_of_a_real_environment() -> None:
    environment = Environment(Path(sys.prefix))
    lines = ['pytest>=1', 'pytest<1', 'no-such-distribution', 'pip>=1']
    answer = environment.ask(setup_env.UNMET, json.dumps(lines))
    assert answer is not None
    assert answer.split() == ['pytest<1', 'no-such-distribution']


def test_ask_tells_failure_from_silence(tmp_path: Path) -> None:
    environment = make_environment(tmp_path)
    assert environment.ask('pass') == ''
    assert environment.ask('raise AssertionError') is None
    assert Environment(tmp_path / 'nowhere').ask('pass') is None


def test_pinned_takes_the_reference() -> None:
    pins = setup_env.requirement_lines('reference')
    assert pinned('mmcv>=2.0.0,<2.2.0') == tuple(p for p in pins if p.startswith('mmcv=='))
    assert pinned('wheel') == ('wheel',)
    wanted = [line for step in make_steps() for line in step.requirements]
    assert {'torch', 'mmcv', 'mmdet'} <= {setup_env.distribution_name(line) for line in wanted}


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


def test_machine_without_compiler_or_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    monkeypatch.setattr(setup_env.sysconfig, 'get_paths', lambda: {'include': str(tmp_path)})
    monkeypatch.setattr(setup_env, 'NEEDED_BYTES', 2**70)
    lacks = setup_env.missing_prerequisites(tmp_path / 'a' / 'b')
    assert [item.split(' (')[0] for item in lacks[:2]] == ['a C++ compiler', "Python's headers"]
    assert f'under {tmp_path}' in lacks[2]


def test_run_shows_life_and_the_end_of_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(setup_env, 'HEARTBEAT_SECONDS', 0.1)
    environment = make_environment(tmp_path)
    code = (
        'import sys, time; print("[3/97] c++ -c a.cpp", flush=True); time.sleep(0.4); sys.exit(7)'
    )
    with pytest.raises(SystemExit, match=r'failed: .*\n.*gplq-env.log'):
        environment.run([sys.executable, '-c', code])
    out = capsys.readouterr().out
    assert '... 0 min 00 s' in out
    assert ', 3/97 files compiled' in out
    assert out.rstrip().endswith('[3/97] c++ -c a.cpp')
