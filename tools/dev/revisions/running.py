# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Both revisions as folders, the projects in which their jobs run, and the jobs' processes."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.tiny_projects import make_project

from .jobs import CONFIG, CONFIGS, FLOAT, HERE, Job

ROOT = HERE.parents[2]
WORKING_TREE = 'working tree'
SECONDS_PER_JOB = 1800
Log = Callable[[str], None]


class RevisionError(ValueError):
    """A revision cannot be checked out or does not run; the message is one line."""


def git(*arguments: str) -> str:
    """Output of git in this repository.

    Raises:
        RevisionError: If git refuses.
    """
    done = subprocess.run(['git', '-C', str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RevisionError(f'git {" ".join(arguments)}: {done.stderr.strip()}')
    return done.stdout


@contextmanager
def checked_out(revision: str, folder: Path) -> Iterator[Path]:
    """A revision in a folder: a temporary git worktree, or a copy of the working tree.

    Args:
        revision: What git knows, or `WORKING_TREE`: tracked and new files as they are now.
        folder: Does not exist yet.

    Raises:
        RevisionError: If git does not know the revision, or Python would run other code.
    """
    if revision == WORKING_TREE:
        for name in git('ls-files', '-z', '-co', '--exclude-standard').split('\0'):
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        yield _that_runs(folder)
        return
    git('worktree', 'add', '--detach', str(folder), revision)
    try:
        yield _that_runs(folder)
    finally:
        git('worktree', 'remove', '--force', str(folder))


def _that_runs(tree: Path) -> Path:
    done = run_python(['-c', 'import gplq_mm; print(gplq_mm.__file__)'], tree, tree)
    if not done.stdout.startswith(f'{tree}{os.sep}'):
        raise RevisionError(f'Python imports gplq_mm from {done.stdout.strip() or done.stderr}')
    return tree


def run_python(
    command: Sequence[str], folder: Path, tree: Path | None
) -> subprocess.CompletedProcess[str]:
    """Run Python on one CPU thread with a revision's code, output captured.

    Args:
        command: Arguments of Python.
        folder: Where it runs.
        tree: Folder of the revision; None for a process that needs no code of ours.
    """
    environment = {**os.environ, 'PYTHONHASHSEED': '0', 'CUDA_VISIBLE_DEVICES': ''}
    environment.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')
    environment['PYTHONPATH'] = str(tree or '')
    arguments = [sys.executable, '-W', 'ignore', *command]
    try:
        return subprocess.run(
            arguments,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS_PER_JOB,
        )
    except subprocess.TimeoutExpired:
        text = f'stopped after {SECONDS_PER_JOB} s'
        return subprocess.CompletedProcess(arguments, 1, '', text)


def make_projects(folder: Path, jobs: Sequence[Job], log: Log) -> None:
    """Write data, configs and a trained float model for each project that the jobs need.

    Args:
        folder: Of all projects; made here.
        jobs: Which will run.
        log: Takes progress lines.

    Raises:
        RevisionError: If a float model cannot be trained.
    """
    projects = dict.fromkeys(job.project for job in jobs)
    for project in projects:
        if project not in FLOAT:
            (folder / project).mkdir(parents=True)
    trained = [project for project in projects if project in FLOAT]

    def make(project: str) -> None:
        base, float_type = FLOAT[project]
        made = make_project(folder / project, base)
        for name, (recipe, engine) in CONFIGS[project].items():
            text = CONFIG.format(base=base, float_type=float_type, recipe=recipe, engine=engine)
            made.config.with_name(f'{name}.py').write_text(text, encoding='utf-8')
        command = [str(HERE / 'float_model.py'), f'configs/{base}.py']
        done = run_python(command, made.root, None)
        if done.returncode:
            raise RevisionError(f'float model of {project}: {done.stderr[-2000:]}')
        log(f'float model of {project} trained')

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, trained))


def run_jobs(label: str, tree: Path, folder: Path, jobs: Sequence[Job], log: Log) -> dict[str, str]:
    """Run the jobs one after the other with one revision's code.

    Args:
        label: `old` or `new`, for progress lines.
        tree: Folder of the revision.
        folder: Its own copy of the projects.
        jobs: In the order in which they run.
        log: Takes progress lines.

    Returns:
        What went wrong, by job.
    """
    failures: dict[str, str] = {}
    for job in jobs:
        if job.needs in failures:
            failures[job.name] = f'{job.needs} failed'
            continue
        begin = time.monotonic()
        command = [word.format(tree=tree, here=HERE) for word in job.command]
        done = run_python(command, folder / job.project, tree)
        text = f'{done.stdout}\n{done.stderr}'
        (folder / f'{job.name}.log').write_text(text, encoding='utf-8')
        if done.returncode:
            last = (text.strip().splitlines() or ['no output'])[-1]
            failures[job.name] = f'exit code {done.returncode}: {last}'
        outcome = failures.get(job.name, 'done')
        log(f'{label}: {job.name}: {outcome} ({time.monotonic() - begin:.0f} s)')
    return failures
