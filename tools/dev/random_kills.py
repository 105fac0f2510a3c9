# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Kill a GPLQ run at random moments, resume it, and compare it with an uninterrupted one.

Libraries are imported once and every run is forked, so that kills hit the run and not the imports.

Example:
    python tools/dev/random_kills.py my_gplq_config.py --work-dir /tmp/kills --kills 20
"""

import argparse
import importlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path

FILES = ('gplq_stage1.pth', 'gplq_final.pth')
STAGES = ('fp32', 'stage1', 'stage2')
MODULES = ('models', 'datasets', 'engine', 'evaluation', 'visualization')
Start = Callable[[Path, bool], int]
"""Runs in a child process: work dir, whether to resume -> exit code."""


def begin(start: Start, work_dir: Path, resume: bool) -> ForkProcess:
    """Start a run in a child process that has its own group; it logs to ``WORK_DIR.log``."""
    sys.stdout.flush()
    process = get_context('fork').Process(target=_child, args=(start, work_dir, resume))
    process.start()
    return process


def _child(start: Start, work_dir: Path, resume: bool) -> None:
    os.setsid()
    log = os.open(f'{work_dir}.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(start(work_dir, resume))


def differences(one: Path, two: Path) -> list[str]:
    """Names of what two work dirs have and is not equal to the bit: tensors and metrics."""
    import torch

    from gplq_mm.analysis import REPORT_NAME, read_json

    found = []
    for name in FILES:
        a, b = (torch.load(d / name, weights_only=True)['state_dict'] for d in (one, two))
        found += [f'{name}: keys'] if set(a) != set(b) else []
        found += [f'{name}: {key}' for key in a if key in b and not torch.equal(a[key], b[key])]
    left, right = read_json(one / REPORT_NAME), read_json(two / REPORT_NAME)
    for stage in STAGES:
        if left[stage]['metrics'] != right[stage]['metrics']:
            found.append(f'{REPORT_NAME}: {stage}.metrics')
    return found


def whole_run(start: Start, work_dir: Path) -> float:
    """Run without a kill; return its seconds.

    Raises:
        SystemExit: If it fails.
    """
    started = time.monotonic()
    process = begin(start, work_dir, False)
    process.join()
    if process.exitcode:
        sys.exit(f'the uninterrupted run ended with exit code {process.exitcode}: {work_dir}.log')
    return time.monotonic() - started


def kill_and_resume(
    start: Start, folder: Path, kills: int, seconds: float, seed: int
) -> Iterator[Path]:
    """Kill runs until the number is reached, and let each one end.

    Args:
        start: The run.
        folder: Folder of the work dirs.
        kills: Number of kills over all runs.
        seconds: Length of an uninterrupted run, in seconds. A kill comes within it, counted from
            the start, and within half of it once there is a checkpoint to resume from.
        seed: Seed of the moments.

    Yields:
        The work dir of each finished run.

    Raises:
        SystemExit: If a resumed run fails.
    """
    moments, done, number = random.Random(seed), 0, 0
    while not number or done < kills:
        work_dir, code = folder / f'killed_{number}', None
        while code is None:
            span = seconds / 2 if any(work_dir.glob('*.pth')) else seconds
            moment = moments.uniform(0, span) if done < kills else None
            process = begin(start, work_dir, True)
            process.join(moment)
            code = process.exitcode
            if code is None:
                assert process.pid is not None
                process.kill()
                with suppress(ProcessLookupError):  # killed before it had a group
                    os.killpg(process.pid, signal.SIGKILL)
                process.join()
                done += 1
                left = ', '.join(sorted(p.name for p in work_dir.glob('*.pth'))) or 'no checkpoint'
                print(f'kill {done} in {work_dir.name} after {moment:.1f} s: {left}', flush=True)
        if code:
            sys.exit(f'{work_dir.name} ended with exit code {code}: {work_dir}.log')
        number += 1
        yield work_dir


def training(config: str) -> Start:
    """Import what a config needs; return its training as ``tools/train.py`` runs it."""
    tools = Path(__file__).resolve().parents[1]
    sys.path.insert(0, str(tools))
    train = importlib.import_module('train')
    from gplq_mm.integrations.mm.launch.tools import load_config, run_tool

    scope = load_config(config).get('default_scope', 'mmengine')
    for name in MODULES:
        importlib.import_module(f'{scope}.{name}')

    def start(work_dir: Path, resume: bool) -> int:
        words = [config, '--work-dir', str(work_dir), *(['--resume'] if resume else [])]
        return run_tool(lambda: train.main(words))

    return start


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description='Kill a run at random moments and resume it')
    parser.add_argument('config', help='GPLQ config that ends in minutes at most')
    parser.add_argument('--work-dir', type=Path, required=True, help='new folder for all runs')
    parser.add_argument('--kills', type=int, default=20, help='number of kills over all runs')
    parser.add_argument('--seed', type=int, default=0, help='seed of the moments')
    args = parser.parse_args(argv)
    start = training(args.config)
    shutil.rmtree(args.work_dir / 'whole', ignore_errors=True)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    seconds = whole_run(start, args.work_dir / 'whole')
    print(f'uninterrupted: {seconds:.1f} s', flush=True)
    found = {}
    for run in kill_and_resume(start, args.work_dir, args.kills, seconds, args.seed):
        found[run.name] = differences(args.work_dir / 'whole', run)
        print(f'{run.name}: {"; ".join(found[run.name][:5]) or "equal"}', flush=True)
    print(f'{args.kills} kills in {len(found)} runs, {sum(map(bool, found.values()))} differ')
    return int(any(found.values()))


if __name__ == '__main__':
    sys.exit(main())
