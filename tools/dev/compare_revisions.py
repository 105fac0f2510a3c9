# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Run the same small jobs with two revisions on this machine and compare every bit they leave.

What a refactoring has to be shown with: calibrated scales, loss of each iteration, checkpoint of
each stage, scores, reports, weight algorithms, sensitivity, printed recipes. Exit code 1 if
anything differs.

Examples:
    python tools/dev/compare_revisions.py main                 # against the working tree
    python tools/dev/compare_revisions.py v0.1.0 HEAD --jobs torch vit-fused
"""

import argparse
import json
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the tests' tiny projects

from revisions.differences import LEFT_OUT, Comparison, Difference
from revisions.jobs import JOBS, Job
from revisions.running import (
    WORKING_TREE,
    RevisionError,
    checked_out,
    make_projects,
    run_jobs,
)

USER_ERROR = 2


@dataclass(frozen=True)
class Row:
    """One line of the table: a file of a job, how much of it was compared, what differs."""

    job: str
    file: str
    compared: int
    differences: list[Difference]

    def cells(self) -> list[str]:
        if not self.differences:
            return [self.job, self.file, f'equal ({self.compared} values)']
        more = f' (and {len(self.differences) - 1} more)' if len(self.differences) > 1 else ''
        return [self.job, self.file, f'DIFFERENT: {self.differences[0]}{more}']


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='Compare what two revisions compute, bit for bit',
        epilog='never compared: ' + ', '.join(f'{key} ({why})' for key, why in LEFT_OUT.items()),
    )
    parser.add_argument('old', help='revision that git knows, such as main')
    parser.add_argument(
        'new', nargs='?', default=WORKING_TREE, help='revision; the working tree by default'
    )
    names = [job.name for job in JOBS]
    parser.add_argument('--jobs', nargs='+', choices=names, default=names, help='all by default')
    parser.add_argument(
        '--ignore', nargs='+', default=[], metavar='KEY', help='more keys to leave out'
    )
    parser.add_argument('--all', action='store_true', help='print every difference')
    parser.add_argument(
        '--keep', metavar='DIR', help='a new folder, which keeps what the jobs wrote'
    )
    return parser.parse_args(argv)


def read_results(path: Path, part: str) -> Any:
    """Content of a file that a job wrote.

    The files come from this tool's own processes, so that pickles may be loaded: a training
    state of MMEngine is one.

    Args:
        path: Checkpoint, JSON, JSON lines, pickle or text.
        part: `scales` for the quantizers' state of a checkpoint alone; empty for all.
    """
    if path.suffix == '.pth':
        content = torch.load(path, map_location='cpu', weights_only=False)
        if part == 'scales':
            return {k: v for k, v in content['state_dict'].items() if '_quantizer.' in k}
        return content
    if path.suffix == '.pkl':
        return pickle.loads(path.read_bytes())
    text = path.read_text(encoding='utf-8')
    if path.name == 'scalars.json':
        return [json.loads(line) for line in text.splitlines()]
    if path.suffix == '.json':
        return json.loads(text)
    return [line for line in text.splitlines() if not line.startswith('# gplq_mm ')]


def compare_files(pattern: str, job: Job, old: Path, new: Path, ignored: Collection[str]) -> Row:
    """Compare one file of a job.

    Args:
        pattern: One of the job's files; what follows `#` names a part.
        job: The job.
        old: Folder of the old revision's projects.
        new: The same of the new one.
        ignored: Keys to leave out, beside those that always are.
    """
    name, _, part = pattern.partition('#')
    found = [sorted((folder / job.project).glob(name)) for folder in (old, new)]
    title = f'{Path(name).name}{f": {part}" if part else ""}'
    if [len(paths) for paths in found] != [1, 1]:
        counts = [f'{len(paths)} files' for paths in found]
        return Row(job.name, title, 0, [Difference(f'{name}, one expected', *counts)])
    comparison = Comparison(ignored)
    results = [read_results(paths[0], part) for paths in found]
    differences = list(comparison.differences(*results))
    if not comparison.compared and not differences:
        differences = [Difference(name, 'nothing to compare', 'nothing to compare')]
    return Row(job.name, title, comparison.compared, differences)


def compare(
    jobs: Sequence[Job],
    folders: tuple[Path, Path],
    failures: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
    ignored: Collection[str] = (),
) -> list[Row]:
    """Compare all files of all jobs; a job that failed counts as a difference.

    Args:
        jobs: Which ran.
        folders: Projects of the old and of the new revision.
        failures: What went wrong in each, by job.
        ignored: Keys to leave out, beside those that always are.
    """
    rows = []
    for job in jobs:
        problems = [found.get(job.name, 'ran') for found in failures]
        if problems != ['ran', 'ran']:
            rows.append(Row(job.name, 'process', 0, [Difference('outcome', *problems)]))
        else:
            rows += [compare_files(file, job, *folders, ignored) for file in job.files]
    return rows


def table(rows: Sequence[Row], every: bool = False) -> str:
    """The rows as text, columns aligned.

    Args:
        rows: What was compared.
        every: List all differences below the table.
    """
    lines = [['job', 'compared', 'result'], *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    text = [f'{job:{widths[0]}}  {file:{widths[1]}}  {result}' for job, file, result in lines]
    if every:
        text += [f'{row.job} {row.file}: {d}' for row in rows for d in row.differences]
    return '\n'.join(text)


def chosen_jobs(names: Collection[str]) -> list[Job]:
    """Jobs by name, and those whose files they read."""
    needed = {job.needs for job in JOBS if job.name in names}
    return [job for job in JOBS if job.name in names or job.name in needed]


def compare_revisions(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Check out, run and compare.

    Args:
        args: Command line.
        folder: For worktrees and results; is empty.

    Raises:
        RevisionError: If a revision cannot be checked out, or a float model not be trained.
    """
    begin, jobs = time.monotonic(), chosen_jobs(args.jobs)

    def log(text: str) -> None:
        print(f'[{time.monotonic() - begin:4.0f} s] {text}', file=sys.stderr, flush=True)

    with ExitStack() as stack:
        revisions = {'old': args.old, 'new': args.new}
        trees = {
            label: stack.enter_context(checked_out(revision, folder / f'{label}_tree'))
            for label, revision in revisions.items()
        }
        log(f'{args.old} against {args.new}: {len(jobs)} jobs in {folder}')
        make_projects(folder / 'old', jobs, log)
        shutil.copytree(folder / 'old', folder / 'new')
        with ThreadPoolExecutor(2) as pool:
            running = [
                pool.submit(run_jobs, label, tree, folder / label, jobs, log)
                for label, tree in trees.items()
            ]
            failures = running[0].result(), running[1].result()
    return compare(jobs, (folder / 'old', folder / 'new'), failures, args.ignore)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # remove worktrees
    with ExitStack() as stack:
        try:
            if args.keep:
                folder = Path(args.keep).resolve()
                folder.mkdir(parents=True)
            else:
                temporary = tempfile.TemporaryDirectory(prefix='compare_revisions_')
                folder = Path(stack.enter_context(temporary)).resolve()
            rows = compare_revisions(args, folder)
        except (RevisionError, FileExistsError) as error:
            print(f'error: {error}', file=sys.stderr)
            return USER_ERROR
    print(table(rows, args.all))
    different = sum(bool(row.differences) for row in rows)
    print(f'{different} of {len(rows)} comparisons differ' if different else 'all equal')
    return int(bool(different))


if __name__ == '__main__':
    sys.exit(main())
