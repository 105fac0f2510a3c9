# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Build the environment of `make env`, `make demo` and `make test`: standard library only.

Needs Python >= 3.10 with venv and headers, and a C++ compiler. Every step first checks what is
installed already, so an interrupted run continues where it stopped. After all steps have passed, a
stamp file keyed on the requirements ends later runs at once.

Example:
    python3 tools/dev/setup_env.py --venv .venv --dry-run
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / 'requirements' / 'reference.txt'
HASHED = ('requirements/*.txt', 'setup.py', 'gplq_mm/version.py', 'tools/dev/setup_env.py')
HEARTBEAT_SECONDS = 30
NEEDED_BYTES = 12 * 2**30
BUILD_PROGRESS = re.compile(r'^\s*\[(\d+/\d+)\]', re.MULTILINE)

# Both run by the environment's own Python. The first prints the requirement lines not met.
UNMET = """
import json, sys
from importlib.metadata import PackageNotFoundError, distribution
from pip._vendor.packaging.requirements import Requirement
for line in json.loads(sys.argv[1]):
    required = Requirement(line)
    try:
        found = distribution(required.name)
        complete = found.read_text('INSTALLER') and found.read_text('RECORD')
        if not complete or not required.specifier.contains(found.version, prereleases=True):
            print(line)
    except PackageNotFoundError:
        print(line)
"""
# A suitable mmcv: its operators load, mmdet accepts it, and it supports torch's device.
MMCV_FITS = """
import os, re
import mmcv, mmcv.ops
version = tuple(int(part) for part in re.findall(r'\\d+', mmcv.__version__)[:2])
assert (2, 0) <= version < (2, 2), mmcv.__version__
if os.environ['FORCE_CUDA'] == '1':
    assert mmcv.ops.get_compiling_cuda_version() != 'not available', 'no CUDA operators'
"""
SEES_CUDA = 'import torch; print(int(torch.cuda.is_available()))'


@dataclass(frozen=True)
class Step:
    """One step of the set-up.

    Attributes:
        title: Description, with its duration.
        requirements: Requirement lines that it installs.
        smoke: Code that must run in the environment afterwards.
        pip: Arguments of `pip install`; `requirements` if empty.
        environ: Gives the variables for `pip` and `smoke`; called when the step runs.
        adopt: Whether `smoke` alone decides, so that another version than the pinned one is kept.
        repeat: Whether it always runs: only the stamp tells if its sources changed.
    """

    title: str
    requirements: tuple[str, ...]
    smoke: str
    pip: tuple[str, ...] = ()
    environ: Callable[[Environment], dict[str, str]] = lambda environment: {}
    adopt: bool = False
    repeat: bool = False


class Environment:
    """A virtual environment under construction.

    Args:
        venv: Its folder.
    """

    def __init__(self, venv: Path) -> None:
        self.venv = venv
        self.python = venv / 'bin' / 'python'
        self.stamp = venv / '.gplq-env'
        self.log = venv / 'gplq-env.log'
        self.pip = [str(self.python), '-m', 'pip']

    def digest(self) -> str:
        """Hash everything that the environment depends on, paths included."""
        sha = hashlib.sha256(f'{ROOT} {self.venv}'.encode())
        for pattern in HASHED:
            for path in sorted(ROOT.glob(pattern)):
                sha.update(path.read_bytes())
        return sha.hexdigest()

    def is_current(self) -> bool:
        """Whether a complete run wrote its stamp and nothing has changed since then."""
        if not (self.stamp.exists() and self.python.exists()):
            return False
        return self.stamp.read_text(encoding='utf-8') == self.digest()

    def ask(self, code: str, *argv: str, environ: dict[str, str] | None = None) -> str | None:
        """Run code in the environment; return its output, or None if it failed."""
        if not self.python.exists():
            return None
        done = subprocess.run(
            [str(self.python), '-W', 'ignore', '-c', code, *argv],
            capture_output=True,
            text=True,
            env={**os.environ, **(environ or {})},
            cwd=self.venv,
        )
        return done.stdout if done.returncode == 0 else None

    def unmet(self, step: Step) -> str | None:
        """List the requirement lines that are not met; None if the environment does not run yet."""
        return self.ask(UNMET, json.dumps(step.requirements))

    def works(self, step: Step) -> bool:
        """Run a step's smoke code."""
        return self.ask(step.smoke, environ=step.environ(self)) is not None

    def is_done(self, step: Step) -> bool:
        """Tell whether a step has nothing to do."""
        met = step.adopt or self.unmet(step) == ''
        return met and not step.repeat and self.works(step)

    def create(self) -> None:
        """Create the environment's folder, or repair one without a working Python."""
        subprocess.run([sys.executable, '-m', 'venv', str(self.venv)], check=True)

    def pip_line(self, step: Step, *options: str) -> list[str]:
        """Compose the command of a step."""
        words = step.pip or step.requirements
        return [*self.pip, 'install', '--no-input', '-c', str(REFERENCE), *options, *words]

    def install(self, step: Step) -> None:
        """Run a step and check its result.

        A package that is installed and does not work is replaced. A cached wheel may have been
        built for another torch or device: it is deleted and built again.

        Raises:
            SystemExit: pip failed, or what it installed does not work.
        """
        options = ['--force-reinstall'] if self.unmet(step) == '' else []
        if options:
            self.forget_wheels(step)
        self.run(self.pip_line(step, *options), step.environ(self))
        self.repair_opencv()
        if not self.works(step) and 'Building wheel' not in self.read_log():
            say('      a wheel cached by pip does not work here: building again')
            self.forget_wheels(step)
            self.run(self.pip_line(step, '--force-reinstall'), step.environ(self))
            self.repair_opencv()
        if not self.works(step):
            sys.exit(f'installed, but this does not run in {self.python}:\n{step.smoke}')

    def forget_wheels(self, step: Step) -> None:
        """Delete the wheels that pip built for a step and cached."""
        for line in step.requirements:
            name = distribution_name(line)
            subprocess.run([*self.pip, 'cache', 'remove', name], capture_output=True)

    def repair_opencv(self) -> None:
        """Install OpenCV's headless build if libGL is missing (servers, containers)."""
        if self.ask(UNMET, '["opencv-python"]') != '' or self.ask('import cv2') is not None:
            return
        say('      OpenCV does not load, libGL is missing: installing opencv-python-headless')
        self.run([*self.pip, 'uninstall', '-y', 'opencv-python'])
        self.run([*self.pip, 'install', '-c', str(REFERENCE), 'opencv-python-headless'])

    def run(self, command: list[str], environ: dict[str, str] | None = None) -> None:
        """Run a command, log its output, print the elapsed time every `HEARTBEAT_SECONDS`.

        Raises:
            SystemExit: The command failed; the end of its output has been shown.
        """
        path = f'{self.venv / "bin"}{os.pathsep}{os.environ.get("PATH", "")}'
        env = {**os.environ, **(environ or {}), 'PATH': path}
        with self.log.open('w', encoding='utf-8') as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        start = time.monotonic()
        while process.poll() is None:
            try:
                process.wait(HEARTBEAT_SECONDS)
            except subprocess.TimeoutExpired:
                minutes, seconds = divmod(int(time.monotonic() - start), 60)
                progress = build_progress(self.read_log())
                say(f'      ... {minutes} min {seconds:02d} s{progress}')
        if process.returncode:
            say('\n'.join(self.read_log().splitlines()[-30:]))
            sys.exit(f'failed: {shlex.join(command)}\nthe whole output: {self.log}')

    def read_log(self) -> str:
        """Return the output of the latest command so far."""
        return self.log.read_text(encoding='utf-8', errors='replace')


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def build_progress(log: str) -> str:
    """Number of compiled files, such as `, 12/97 files compiled`."""
    done = BUILD_PROGRESS.findall(log)
    return f', {done[-1]} files compiled' if done else ''


def distribution_name(line: str) -> str:
    """The package name of a requirement line."""
    return re.split(r'[<>=!~\[; ]', line, maxsplit=1)[0]


def requirement_lines(name: str) -> tuple[str, ...]:
    """Read `requirements/<name>.txt` without comments."""
    text = (ROOT / 'requirements' / f'{name}.txt').read_text(encoding='utf-8')
    return tuple(line for line in (raw.split('#')[0].strip() for raw in text.splitlines()) if line)


def pinned(*lines: str) -> tuple[str, ...]:
    """Replace requirement lines by their pins in `requirements/reference.txt`, if they have one."""
    pins = {distribution_name(pin): pin for pin in requirement_lines('reference')}
    return tuple(pins.get(distribution_name(line), line) for line in lines)


def mmcv_environ(environment: Environment) -> dict[str, str]:
    """Decide how mmcv's operators are built: for CUDA only if both torch and nvcc support it."""
    sees_cuda = (environment.ask(SEES_CUDA) or '').strip() == '1'
    home = Path(os.environ.get('CUDA_HOME', '/usr/local/cuda'))
    has_nvcc = shutil.which('nvcc') is not None or (home / 'bin' / 'nvcc').exists()
    jobs = os.environ.get('MAX_JOBS', str(os.cpu_count() or 1))
    environ = {'MMCV_WITH_OPS': '1', 'MAX_JOBS': jobs, 'FORCE_CUDA': '0'}
    if sees_cuda and has_nvcc:
        return {**environ, 'FORCE_CUDA': '1'}
    return {**environ, 'CUDA_VISIBLE_DEVICES': ''}


def make_steps() -> tuple[Step, ...]:
    """List the steps in their order."""
    mmcv = pinned('mmcv')
    libraries = [line for line in requirement_lines('mminstall') if 'mmcv' not in line]
    tools = pinned(*requirement_lines('tests'), *requirement_lines('lint'))
    runtime = requirement_lines('runtime')
    here = f'assert gplq_mm.__file__.startswith({str(ROOT)!r}), gplq_mm.__file__'
    return (
        Step(
            'virtual environment with build tools',
            ('pip>=24', *pinned('setuptools'), 'wheel', 'ninja'),
            'import setuptools, pkg_resources',
        ),
        Step(
            'PyTorch (a download of about 3 GB) and MMEngine',
            tuple(dict.fromkeys(pinned('torch', 'torchvision', 'mmengine', *runtime))),
            'import torch, torchvision.ops, mmengine',
        ),
        Step(
            'mmcv with its operators (about 15 minutes on two cores, once)',
            mmcv,
            MMCV_FITS,
            ('-v', '--no-build-isolation', *mmcv),
            mmcv_environ,
            adopt=True,
        ),
        Step(
            'mmdet, mmpretrain and mmsegmentation',
            pinned(*libraries),
            'import mmdet, mmpretrain, mmseg.models, pycocotools.mask',
        ),
        Step(
            'ONNX, ONNX Runtime, OpenVINO and safetensors',
            pinned(*requirement_lines('deploy')),
            'import onnx, onnxscript, onnxruntime, openvino, safetensors',
        ),
        Step('test and lint tools', tools, 'import hypothesis, matplotlib, pytest, sklearn, xdist'),
        Step(
            'gplq_mm itself, editable',
            ('gplq-mm',),
            f'import gplq_mm; {here}',
            ('--no-build-isolation', '--no-deps', '-e', str(ROOT)),
            repeat=True,
        ),
    )


def missing_prerequisites(venv: Path) -> list[str]:
    """List missing prerequisites of the machine, each with the way to install it."""
    lacks = []
    compiler = os.environ.get('CXX', 'c++')
    if not (shutil.which(compiler) or shutil.which('g++')):
        lacks.append('a C++ compiler (Debian, Ubuntu: apt-get install g++)')
    if not Path(sysconfig.get_paths()['include'], 'Python.h').exists():
        lacks.append("Python's headers (Debian, Ubuntu: apt-get install python3-dev)")
    parent = next(folder for folder in (venv, *venv.parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < NEEDED_BYTES:
        lacks.append(f'{NEEDED_BYTES >> 30} GiB of disk under {parent} (free: {free >> 30} GiB)')
    return lacks


def plan(environment: Environment, steps: tuple[Step, ...]) -> None:
    """Print what `build` would do."""
    for number, step in enumerate(steps, 1):
        done = environment.is_done(step)
        say(f'[{number}/{len(steps)}] {step.title}: {"there" if done else "to do"}')
        if not done:
            say(f'      {shlex.join(environment.pip_line(step))}')


def build(environment: Environment, steps: tuple[Step, ...]) -> None:
    """Run every step that is not done yet, and write the stamp.

    Raises:
        SystemExit: The machine lacks something, or a step failed.
    """
    if not all(environment.works(step) for step in steps if step.adopt):
        lacks = missing_prerequisites(environment.venv)
        if lacks:
            sys.exit('this machine lacks:\n' + '\n'.join(f'  {item}' for item in lacks))
    if not environment.python.exists():
        environment.create()
    for number, step in enumerate(steps, 1):
        head = f'[{number}/{len(steps)}] {step.title}'
        if environment.is_done(step):
            say(f'{head}: there')
            continue
        say(f'{head} ...')
        start = time.monotonic()
        environment.install(step)
        say(f'      done in {time.monotonic() - start:.0f} s')
    environment.stamp.write_text(environment.digest(), encoding='utf-8')


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and build or plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--venv', type=Path, default=ROOT / '.venv', help='folder to build in')
    parser.add_argument('--dry-run', action='store_true', help='print the steps, do nothing')
    args = parser.parse_args(argv)
    if sys.version_info < (3, 10):  # noqa: UP036  the only file that any Python may run
        parser.exit(1, f'Python >= 3.10 is needed, this is {sys.version.split()[0]}\n')
    environment = Environment((ROOT / args.venv).absolute())
    if args.dry_run:
        plan(environment, make_steps())
    elif not environment.is_current():
        build(environment, make_steps())
        say(f'environment ready: {environment.venv}')
    return 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit('stopped; the same command continues from here')
