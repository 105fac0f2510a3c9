# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Latency, memory and exactness of deployed models against float ones, in one run.

    python tools/benchmarks/inference.py vit_s_224 swin_t_224 --threads 1 2
    python tools/benchmarks/inference.py --config CONFIG --checkpoint gplq_final.pth --data DIR
    python tools/benchmarks/inference.py vit_s_224 mask_rcnn_swin_t --out rows.json --resume
    python tools/benchmarks/inference.py --table --out docs/benchmarks/inference.json

Every backend gets the same images and runs in a process of its own. The processes take turns, so
that a change of the machine's speed reaches all of them alike. A backend that cannot run gives a
row with the reason. The built-in models have random weights, and their rows say so. Models come in
the given order, all of them with the first number of threads before the next. Rows replace those of
the same model, batch size and threads in `--out`; with `--resume` they are kept instead, so a run
that was stopped goes on. A bar chart is written next to the rows.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from inference_backends import BACKENDS
from inference_group import Group
from inference_machine import isa, processor_flags
from inference_models import MODELS_BY_NAME
from inference_table import draw, footnote, merged, rows_of, table

from gplq_mm.analysis import read_json, write_json
from gplq_mm.recipe import as_recipe

FILES = Path(__file__).with_name('inference_files.py')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('models', nargs='*', help=', '.join(MODELS_BY_NAME))
    parser.add_argument('--config', help='GPLQ config of your own model')
    parser.add_argument('--checkpoint', help='its gplq_final.pth')
    parser.add_argument('--data', help="folder that replaces the config's data_root")
    parser.add_argument('--recipe', default='w4a4', help='preset of the built-in models')
    parser.add_argument('--backends', nargs='+', choices=list(BACKENDS), default=list(BACKENDS))
    parser.add_argument('--batch', type=int, nargs='+', help='images a call; default: by model')
    parser.add_argument('--threads', type=int, nargs='+', default=[1], help='threads a process')
    parser.add_argument('--rounds', type=int, default=15, help='turns of each backend')
    parser.add_argument(
        '--images', type=int, default=32, help='images whose outputs are compared bit for bit'
    )
    parser.add_argument('--no-check', action='store_true', help='compare no outputs')
    parser.add_argument('--no-score', action='store_true', help="do not score a user's model")
    parser.add_argument(
        '--work-dir', type=Path, default=Path('work_dirs/inference'), help="folder of models' files"
    )
    parser.add_argument('--reuse', action='store_true', help='keep files of an earlier run')
    parser.add_argument('--out', type=Path, help='JSON to add the rows to')
    parser.add_argument(
        '--resume', action='store_true', help='leave out what --out has rows of; keeps files too'
    )
    parser.add_argument('--table', action='store_true', help='print the rows of --out and draw')
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse a command line that cannot be run, before anything is built.

    Raises:
        SystemExit: In one line.
    """
    unknown = [name for name in args.models if name not in MODELS_BY_NAME]
    if unknown:
        raise SystemExit(f'{unknown[0]}: write one of {", ".join(MODELS_BY_NAME)}, or --config')
    if bool(args.config) != bool(args.checkpoint):
        raise SystemExit('--config and --checkpoint belong together: write both')
    for path in filter(None, (args.config, args.checkpoint, args.data)):
        if not Path(path).exists():
            raise SystemExit(f'{path} does not exist')
    if not (args.models or args.config or args.table):
        raise SystemExit(f'name a model: {", ".join(MODELS_BY_NAME)}, or --config and --checkpoint')
    if args.resume and not args.out:
        raise SystemExit('--resume goes on with the rows of --out FILE: write it')
    if args.table and not (args.out and args.out.is_file()):
        raise SystemExit('--table prints the rows of --out FILE, which must exist')
    least = [*(args.batch or []), *args.threads, args.rounds, args.images]
    if min(least) < 1:
        raise SystemExit('--batch, --threads, --rounds and --images are positive numbers')
    try:
        as_recipe(args.recipe)
    except ValueError as error:
        raise SystemExit(f'--recipe: {error}') from error


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each model, print the table, write JSON and chart."""
    args = parse_args(argv)
    check(args)
    names = [*args.models, *([Path(args.config).stem] if args.config else [])]
    report: dict[str, Any] = read_json(args.out) if args.out else {}
    processor = isa(processor_flags())
    known = set() if not args.resume else measured_groups(report, args.backends, processor)
    todo = [
        (name, threads)
        for threads in args.threads
        for name in names
        if not all((name, batch, threads) in known for batch in batches_of(name, args))
    ]
    cases: dict[str, tuple[Path, dict[str, Any]]] = {}
    started = time.monotonic()
    for done, (name, threads) in enumerate(todo):
        if name not in cases:
            cases[name] = prepared(name, args)
        folder, about = cases[name]
        where = f'[{done + 1}/{len(todo)}] {name}, {threads} thread(s)'
        say = Progress(where, started, done, len(todo))
        group = Group(folder, about, args.backends, threads, say)
        scored = bool(about['config']) and not args.no_score and threads == args.threads[0]
        measured = group.run(args.rounds, not args.no_check, scored)
        rows = rows_of(about, measured, threads, processor)
        report['rows'] = merged(report.get('rows', []), rows)
        if args.out:
            report['torch'] = torch.__version__
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.out, report)
        print(f'{table(rows)}\n{footnote(rows)}', flush=True)
    if args.table:
        print(f'{table(report["rows"])}\n{footnote(report["rows"])}')
    if args.out:
        draw(report['rows'], args.out.with_suffix('.png'))


def measured_groups(
    report: dict[str, Any], backends: Sequence[str], processor: str
) -> set[tuple[str, int, int]]:
    """Model, batch size and threads of which a report has a row of every backend.

    Args:
        report: Content of `--out`.
        backends: Backends of this run.
        processor: Its instruction sets; rows of another processor do not count.
    """
    found: dict[tuple[str, int, int], set[str]] = {}
    for row in report.get('rows', []):
        if row['isa'] == processor:
            group = row['model'], row['batch'], row['threads']
            found.setdefault(group, set()).add(row['backend'])
    return {group for group, names in found.items() if names >= set(backends)}


def batches_of(name: str, args: argparse.Namespace) -> list[int]:
    """Batch sizes that are measured of a model."""
    return sorted(args.batch or (MODELS_BY_NAME[name][3] if name in MODELS_BY_NAME else (1,)))


class Progress:
    """Prints steps with the time that the remaining models will take, from those that are done."""

    def __init__(self, where: str, started: float, done: int, groups: int) -> None:
        self.where, self.started, self.done, self.groups = where, started, done, groups

    def __call__(self, text: str) -> None:
        """Print one step."""
        taken, rest = time.monotonic() - self.started, ''
        if self.done:
            left = taken / self.done * (self.groups - self.done)
            rest = f'; all: {left / 60:.0f} min'
        print(f'{self.where}: {text}{rest}', file=sys.stderr, flush=True)


def prepared(name: str, args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Folder of a model's files, written in a process of its own, and their description."""
    folder: Path = args.work_dir / name
    own = args.config is not None and name == Path(args.config).stem
    batches = batches_of(name, args)
    about: dict[str, Any] = {
        'name': name,
        'recipe': args.recipe,
        'batches': batches,
        'images': max(args.images, *batches),
        'config': args.config if own else None,
        'checkpoint': args.checkpoint if own else None,
        'data': args.data if own else None,
        'torch': torch.__version__,
        'files': list(dict.fromkeys(n for b in args.backends for n in BACKENDS[b].needs)),
    }
    known = read_json(folder / 'case.json')
    if (
        (args.reuse or args.resume)
        and 'reasons' in known
        and all(known.get(k) == v for k, v in about.items())
    ):
        return folder, known
    folder.mkdir(parents=True, exist_ok=True)
    for file in [f for f in folder.iterdir() if f.is_file()]:
        file.unlink()
    write_json(folder / 'case.json', about)
    command = [sys.executable, str(FILES), str(folder)]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(f'{name}: its files could not be written, exit code {code}')
    return folder, read_json(folder / 'case.json')


if __name__ == '__main__':
    main()
