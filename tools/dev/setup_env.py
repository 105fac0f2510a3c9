# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Build the environment of `make env`, `make demo` and `make test`: standard library only.

Needs Python >= 3.10 with venv and headers, and a C++ compiler. uv installs what the registry has
built, pip where uv cannot; mmcv's operators are compiled, with torch's headers precompiled, unless
an installed mmcv fits. An interrupted run continues where it stopped. After all steps have passed,
a stamp file keyed on the requirements ends later runs at once.

Example:
    python3 tools/dev/setup_env.py --venv .venv --dry-run
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.dev.compile_progress import as_time, run_logged, say  # noqa: E402  by the line above
from tools.dev.precompiled_header import write_launcher  # noqa: E402

REFERENCE = ROOT / 'requirements' / 'reference.txt'
HASHED = ('requirements/*.txt', 'setup.py', 'gplq_mm/version.py', 'tools/dev/setup_env.py')
NEEDED_BYTES = 12 * 2**30
ONEDL = {'mmcv': 'onedl-mmcv', 'mmdet': 'onedl-mmdetection'}
ONEDL |= {'mmengine': 'onedl-mmengine', 'mmpretrain': 'onedl-mmpretrain'}
ONEDL |= {'mmsegmentation': 'onedl-mmsegmentation'}
"""Successors of OpenMMLab's packages, with the same modules: kept where they are installed."""

# These run in the environment. A package whose installation was interrupted is forgotten.
FORGET_INCOMPLETE = """
import shutil, sys, sysconfig
from importlib.metadata import distributions
for found in distributions(path=[sysconfig.get_path('purelib')]):
    files = [file for file in found.files or () if file.suffix != '.pyc']
    complete = found.read_text('INSTALLER') and files and all(f.locate().exists() for f in files)
    if not complete and found._path.suffix == '.dist-info':
        shutil.rmtree(found._path)
        print(found._path.stem)
"""
INSTALLED = 'import importlib.metadata, sys; importlib.metadata.version({!r})'
TOOLS_WORK = 'import setuptools, pkg_resources, pip, wheel, ninja'  # ninja needs setuptools first
SEES_CUDA = 'import torch; print(int(torch.cuda.is_available()))'
# mmdet itself checks mmcv's version when it is imported: 3.3.0 refuses 2.2 and later ones.
MMCV_FITS = """
import os, mmcv, mmcv.ops, mmdet
if os.environ['FORCE_CUDA'] == '1':
    assert mmcv.ops.get_compiling_cuda_version() != 'not available', 'no CUDA operators'
"""
EVERYTHING_WORKS = f"""
import hypothesis, jinja2, material, matplotlib, mkdocs, mmdet, mmengine, mmpretrain, mmseg.models
import onnx, onnxruntime, onnxscript, openvino, playwright, pycocotools.mask, pytest, safetensors
import sklearn, timm, torch, torchvision.ops, vl_convert, xdist
import gplq_mm
assert gplq_mm.__file__.startswith({str(ROOT)!r}), gplq_mm.__file__
"""


@dataclass(frozen=True)
class Step:
    """One step of the set-up.

    Attributes:
        title: Description, with its duration.
        command: Its main command, for a dry run.
        run: Does it.
        is_done: Whether there is nothing to do. Commands that find this out themselves, in less
            than a second, always run.
    """

    title: str
    command: list[str]
    run: Callable[[], None]
    is_done: Callable[[], bool] = lambda: False


class Environment:
    """A virtual environment under construction.

    Args:
        venv: Its folder.
    """

    def __init__(self, venv: Path) -> None:
        self.venv = venv
        self.python = venv / 'bin' / 'python'
        self.uv = venv / 'bin' / 'uv'
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

    def ask(self, code: str, environ: dict[str, str] | None = None) -> str | None:
        """Run code in the environment; return its output, or None if it failed."""
        if not self.python.exists():
            return None
        done = subprocess.run(
            [str(self.python), '-W', 'ignore', '-c', code],
            capture_output=True,
            text=True,
            env={**os.environ, **(environ or {})},
            cwd=self.venv,
        )
        return done.stdout if done.returncode == 0 else None

    def has(self, name: str) -> bool:
        """Whether a distribution is installed."""
        return self.ask(INSTALLED.format(name)) is not None

    def mmcv_fits(self) -> bool:
        """Whether the installed mmcv works, with mmdet and on torch's device."""
        return self.ask(MMCV_FITS, mmcv_environ(self)) is not None

    def create(self) -> None:
        """Create the environment, or repair one without a working Python; install build tools."""
        subprocess.run([sys.executable, '-m', 'venv', str(self.venv)], check=True)
        self.run([*self.pip, 'install', *pinned('setuptools'), 'wheel', 'ninja'])
        subprocess.run([*self.pip, 'install', '-q', 'uv'], check=False)  # pip does its work too

    def install_libraries(self) -> None:
        """Install everything that the registry has built."""
        for name in (self.ask(FORGET_INCOMPLETE) or '').split():
            say(f'      {name} is incomplete: installing it again')
        self.install(library_lines(self))
        if self.has('opencv-python') and self.ask('import cv2') is None:  # servers, containers
            say('      OpenCV does not load, libGL is missing: installing opencv-python-headless')
            self.run([*self.pip, 'uninstall', '-y', 'opencv-python'])
            self.install(['opencv-python-headless'])

    def install(self, words: list[str]) -> None:
        """Install by uv, with its own progress, or else by pip."""
        tail = ['install', '-c', str(REFERENCE), *words]
        if self.uv.exists():
            environ = dict(os.environ)
            if 'PIP_INDEX_URL' in environ:
                environ.setdefault('UV_DEFAULT_INDEX', environ['PIP_INDEX_URL'])
            command = [str(self.uv), 'pip', *tail, '--python', str(self.python)]
            if subprocess.run(command, env=environ, check=False).returncode == 0:
                return
            say('      uv fails: pip tries the same')
        command = [*self.pip, *tail, '--no-input']
        if subprocess.run(command, check=False).returncode:
            sys.exit(f'failed: {shlex.join(command)}')

    def compile_mmcv(self) -> None:
        """Install mmcv with its operators.

        A wheel that pip has cached may have been compiled for another torch or device: one that
        does not work is deleted and compiled again.

        Raises:
            SystemExit: What was compiled does not work either.
        """
        command = mmcv_command(self)
        for options in ([], ['--force-reinstall']):
            if options:
                say('      the wheel of mmcv that pip has cached does not work: compiling it')
                subprocess.run([*self.pip, 'cache', 'remove', 'mmcv'], capture_output=True)
            with tempfile.TemporaryDirectory(prefix='gplq-mmcv-') as folder:
                launcher = write_launcher(Path(folder), os.environ.get('CXX', 'c++'))
                self.run([*command, *options], {**mmcv_environ(self), 'CXX': str(launcher)})
            if self.mmcv_fits():
                return
            if 'Building wheel' in self.read_log():
                break
        sys.exit(f'compiled, but this does not run in {self.python}:\n{MMCV_FITS}')

    def run(self, command: list[str], environ: dict[str, str] | None = None) -> None:
        """Run a command with the environment's tools first, its output in the log."""
        path = f'{self.venv / "bin"}{os.pathsep}{os.environ.get("PATH", "")}'
        run_logged(command, self.log, {**os.environ, **(environ or {}), 'PATH': path})

    def read_log(self) -> str:
        """Return the output of the latest command so far."""
        return self.log.read_text(encoding='utf-8', errors='replace')


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


def library_lines(environment: Environment) -> list[str]:
    """List what all files of `requirements/` need besides mmcv, each distribution once."""
    names = sorted({path.stem for path in REFERENCE.parent.glob('*.txt')} - {REFERENCE.stem})
    lines = [line for name in names for line in requirement_lines(name)]
    wanted = pinned('torchvision', *lines)
    kept = {'mmcv', *(name for name, other in ONEDL.items() if environment.has(other))}
    return [line for line in dict.fromkeys(wanted) if distribution_name(line) not in kept]


def mmcv_command(environment: Environment) -> list[str]:
    """The command that compiles and installs mmcv; `-v` prints what is compiled."""
    options = ['-v', '--no-input', '--no-build-isolation', '--no-deps']
    return [*environment.pip, 'install', *options, *pinned('mmcv')]


def mmcv_environ(environment: Environment) -> dict[str, str]:
    """Decide how mmcv's operators are built: for CUDA only if both torch and nvcc support it."""
    sees_cuda = (environment.ask(SEES_CUDA) or '').strip() == '1'
    home = Path(os.environ.get('CUDA_HOME', '/usr/local/cuda'))
    has_nvcc = shutil.which('nvcc') is not None or (home / 'bin' / 'nvcc').exists()
    jobs = os.environ.get('MAX_JOBS', str(os.cpu_count() or 1))
    environ = {'MMCV_WITH_OPS': '1', 'MAX_JOBS': jobs, 'FORCE_CUDA': '0'}
    # Python's own flags ask for debug information: a third of the time of each file
    environ['CFLAGS'] = f'{os.environ.get("CFLAGS", "")} -g0'.strip()
    if sees_cuda and has_nvcc:
        return {**environ, 'FORCE_CUDA': '1'}
    return {**environ, 'CUDA_VISIBLE_DEVICES': ''}


def make_steps(environment: Environment) -> tuple[Step, ...]:
    """List the steps in their order."""
    venv, pip = str(environment.venv), environment.pip
    libraries = ['uv', 'pip', 'install', '-c', str(REFERENCE), *library_lines(environment)]
    own = [*pip, 'install', '--no-input', '--no-build-isolation', '--no-deps', '-e', str(ROOT)]
    return (
        Step(
            'virtual environment with build tools',
            [sys.executable, '-m', 'venv', venv],
            environment.create,
            lambda: environment.ask(TOOLS_WORK) is not None,
        ),
        Step(
            'libraries (PyTorch alone is a download of about 3 GB)',
            libraries,
            environment.install_libraries,
        ),
        Step(
            'mmcv with its operators (about 3 minutes on two cores, once)',
            mmcv_command(environment),
            environment.compile_mmcv,
            environment.mmcv_fits,
        ),
        Step('gplq_mm itself, editable', own, lambda: environment.run(own)),
    )


def missing_prerequisites(venv: Path) -> list[str]:
    """List missing prerequisites of the machine, each with the way to install it."""
    lacks = []
    compiler = shlex.split(os.environ.get('CXX', 'c++'))[-1]
    if not shutil.which(compiler):
        lacks.append(f'a C++ compiler named {compiler} (Debian, Ubuntu: apt-get install g++)')
    if not Path(sysconfig.get_paths()['include'], 'Python.h').exists():
        lacks.append("Python's headers (Debian, Ubuntu: apt-get install python3-dev)")
    parent = next(folder for folder in (venv, *venv.parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < NEEDED_BYTES:
        lacks.append(f'{NEEDED_BYTES >> 30} GiB of disk under {parent} (free: {free >> 30} GiB)')
    return lacks


def plan(steps: tuple[Step, ...]) -> None:
    """Print what `build` would do."""
    for number, step in enumerate(steps, 1):
        say(f'[{number}/{len(steps)}] {step.title}: {"there" if step.is_done() else "to do"}')
        say(f'      {shlex.join(step.command)}')


def build(environment: Environment, steps: tuple[Step, ...]) -> None:
    """Run every step that is not done yet, and write the stamp.

    Raises:
        SystemExit: The machine lacks something, or a step failed.
    """
    lacks = [] if environment.mmcv_fits() else missing_prerequisites(environment.venv)
    if lacks:
        sys.exit('this machine lacks:\n' + '\n'.join(f'  {item}' for item in lacks))
    begin = time.monotonic()
    for number, step in enumerate(steps, 1):
        head = f'[{number}/{len(steps)}] {step.title}'
        if step.is_done():
            say(f'{head}: there')
            continue
        say(f'{head} ...')
        start = time.monotonic()
        step.run()
        say(f'      done in {as_time(time.monotonic() - start)}')
    if environment.ask(EVERYTHING_WORKS) is None:
        sys.exit(f'installed, but this does not run in {environment.python}:\n{EVERYTHING_WORKS}')
    environment.stamp.write_text(environment.digest(), encoding='utf-8')
    say(f'environment ready in {as_time(time.monotonic() - begin)}: {environment.venv}')


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
        plan(make_steps(environment))
    elif not environment.is_current():
        build(environment, make_steps(environment))
    return 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit('stopped; the same command continues from here')
