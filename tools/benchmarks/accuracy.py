# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Compare recipes by accuracy: recipes x models x bits x seeds, on one data set, in one run.

    python tools/benchmarks/accuracy.py --recipes rtn direct paper ours --bits w4a4 w3a3 \
        --seeds 0 1 2 --out docs/benchmarks/accuracy.json
    python tools/benchmarks/accuracy.py --table --out docs/benchmarks/accuracy.json

Each row is a GPLQ run by config in its own process: calibration, stage 1, stage 2. Its result is
stored at once. After a kill the same command runs the missing rows, and rows whose recipe has
changed. Rows that differ only in the weights' settings share one stage 1. `--transfer flowers17`
adds a row for each: linear probes of its backbone on another data set. Variants of a recipe:

    --recipes ours 'ours-kd=ours:w3a3,optim.lr=1e-4,mimic.type=logits,schedule=constant'
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock
from typing import Any

from accuracy_plan import RESULT_NAME, ROOT, Row, plan
from accuracy_recipes import DEFAULT, RECIPES
from accuracy_table import read_rows, row_key, table, write_rows

from gplq_mm.analysis import read_json, write_json
from gplq_mm.integrations.mm.checkpoints.run_checkpoint import STAGE1_NAME
from gplq_mm.integrations.mm.launch.errors import ConfigError
from gplq_mm.integrations.mm.launch.tools import run_tool

OUT = Path('docs/benchmarks/accuracy.json')
WORK_ROOT = Path('work_dirs/accuracy')
FIGURES = ('fp32', 'stage1', 'stage2', 'seconds', 'peak_memory_bytes')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n')[0],
        epilog=f'known recipes: {", ".join(RECIPES)}; a variant is NAME=BASE[:BITS],KEY=VALUE,...',
    )
    parser.add_argument('--recipes', nargs='+', default=[], help=f'default: {" ".join(DEFAULT)}')
    parser.add_argument('--recipe', action='append', default=[], help='one more recipe or variant')
    parser.add_argument('--bits', nargs='+', default=['w4a4'])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument(
        '--models',
        nargs='+',
        metavar='CONFIG[=CHECKPOINT]',
        help='float configs; the checkpoint is CONFIG with .pth for .py unless it is given. '
        'Default: models/vit_cifar10.py of $GPLQ_DATA_ROOT',
    )
    parser.add_argument(
        '--data-root',
        help="the configs' data_root; '' keeps it. Default: CIFAR-10 of $GPLQ_DATA_ROOT, unzipped",
    )
    parser.add_argument('--dataset', help="name in the rows; default: the folder's")
    parser.add_argument('--epochs', type=int, default=1, help='epochs of stage 1')
    parser.add_argument(
        '--train-fraction', type=float, default=1.0, help='share of the training images'
    )
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast in stage 1')
    parser.add_argument(
        '--transfer',
        metavar='DIR',
        help='folder with train|test/<class>/*, or the name of one in data/ of $GPLQ_DATA_ROOT',
    )
    parser.add_argument('--metric', help="default: the evaluator's first")
    parser.add_argument('--out', type=Path, default=OUT, help='rows (JSON); default: %(default)s')
    parser.add_argument('--work-dir', type=Path, default=WORK_ROOT)
    parser.add_argument('--jobs', type=int, default=1, help='rows at a time')
    parser.add_argument('--threads', type=int, help='threads per row; default: cores / jobs')
    parser.add_argument('--force', action='store_true', help='run stored rows again')
    parser.add_argument('--table', action='store_true', help='print the stored rows, run nothing')
    return parser.parse_args(argv)


class Benchmark:
    """Runs rows and stores each as soon as it is finished.

    Args:
        args: Command line.
        rows: Rows stored already.
    """

    def __init__(self, args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
        self.args = args
        self.rows = {row_key(row): row for row in rows}
        self.lock = Lock()
        self.children: set[subprocess.Popen] = set()
        self.failed: list[str] = []
        self.stopped = False
        self.stage1_dirs: dict[str, Path] = {}
        if not args.force:
            for path in args.work_dir.glob(f'*/{RESULT_NAME}'):
                if (path.parent / STAGE1_NAME).is_file():
                    self.stage1_dirs[read_json(path).get('stage1_key', '')] = path.parent

    def missing(self, planned: list[Row]) -> list[Row]:
        """Rows that are not stored, or whose recipe has changed."""
        if self.args.force:
            return planned
        stored = {key: row.get('fingerprint') for key, row in self.rows.items()}
        return [row for row in planned if stored.get(row_key(row.key)) != row.fingerprint]

    def run(self, todo: list[Row]) -> None:
        """Run rows; those with the same stage 1 run one after another."""
        units: dict[str, list[Row]] = {}
        for row in todo:
            units.setdefault(row.stage1_key, []).append(row)
        with ThreadPoolExecutor(self.args.jobs) as pool:
            try:
                for future in as_completed([pool.submit(self._unit, u) for u in units.values()]):
                    future.result()
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """End the sub-processes and start no more."""
        self.stopped = True
        for child in list(self.children):
            child.terminate()

    def _unit(self, rows: list[Row]) -> None:
        for row in rows:
            if not self.stopped:
                self._row(row)

    def _row(self, row: Row) -> None:
        print(f'{row} ...', flush=True)
        result = self._probes(row) if row.is_transfer else self._stages(row)
        if result is not None:
            self._store(row, result)

    def _stages(self, row: Row) -> dict[str, Any] | None:
        # the row's folder was deleted above
        self.stage1_dirs = {k: d for k, d in self.stage1_dirs.items() if d != row.work_dir}
        stage1_dir = self.stage1_dirs.get(row.stage1_key)
        job = {
            **row.job,
            'stage1_dir': stage1_dir and str(stage1_dir.absolute()),
            'evaluate_fp32': stage1_dir is None and self._fp32(row) is None,
        }
        result = self._process(row, job)
        if result is not None and stage1_dir is None:
            self.stage1_dirs[row.stage1_key] = row.work_dir
        return result

    def _probes(self, row: Row) -> dict[str, Any] | None:
        done = read_json(row.work_dir / RESULT_NAME)
        if done.get('fingerprint') != row.job['fingerprint']:
            self._fail(row, f'its backbone, {row.job["base"]}, is not in {row.work_dir}')
            return None
        return self._process(row, {**row.job, 'evaluate_fp32': False, 'fp32': self._fp32(row)})

    def _fail(self, row: Row, why: str) -> None:
        self.failed.append(f'{row}: {why}')
        print(f'FAILED {self.failed[-1]}', flush=True)

    def _process(self, row: Row, job: dict[str, Any]) -> dict[str, Any] | None:
        """Run the row in its own process; its output goes to a log file next to it."""
        row.work_dir.mkdir(parents=True, exist_ok=True)
        name = 'transfer' if row.is_transfer else 'row'
        path = row.work_dir / f'{name}.job.json'
        write_json(path, job)
        threads = self.args.threads or max(1, (os.cpu_count() or 1) // self.args.jobs)
        environment = {
            **os.environ,
            'OMP_NUM_THREADS': str(threads),
            'MKL_NUM_THREADS': str(threads),
            'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
        }
        script = Path(__file__).with_name(f'accuracy_{name}.py')
        log = row.work_dir / f'{name}.log'
        with log.open('w') as output:
            command = [sys.executable, str(script), str(path)]
            child = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            self.children.add(child)
            code = child.wait()
            self.children.discard(child)
        if code != 0:
            if not self.stopped:
                last = log.read_text().strip().splitlines()[-1:] or ['']
                self._fail(row, f'exit code {code}: {last[0]} (see {log})')
            return None
        return read_json(Path(job['result']))

    def _fp32(self, row: Row) -> float | None:
        """FP32 score of the row's model and data, measured once for all rows."""
        names = ('model', 'dataset', *(('seed',) if row.is_transfer else ()))
        key = [*(row.key[name] for name in names), row.job['checkpoint_sha256']]
        for known in self.rows.values():
            known_key = [*(known[name] for name in names), known.get('checkpoint_sha256')]
            if known_key == key and known['fp32'] is not None:
                return known['fp32']
        return None

    def _store(self, row: Row, result: dict[str, Any]) -> None:
        with self.lock:
            fp32 = result['fp32'] if result['fp32'] is not None else self._fp32(row)
            figures = {name: result[name] for name in FIGURES}
            more = {k: v for k, v in result.items() if k not in (*figures, 'stage1_key')}
            stored = {
                **row.key,
                **figures,
                'fp32': fp32,
                **more,
                'epochs': row.job['epochs'],
                'train_fraction': row.job['train_fraction'],
                'checkpoint_sha256': row.job['checkpoint_sha256'],
                'fingerprint': row.fingerprint,
            }
            self.rows[row_key(stored)] = stored
            write_rows(self.args.out, list(self.rows.values()))
            shown = ' -> '.join(f'{stored[k]:.2f}' for k in ('fp32', 'stage1', 'stage2'))
            print(f'{row}: {shown}, {stored["seconds"]:.0f} s', flush=True)


def chosen(rows: list[dict[str, Any]], planned: list[Row]) -> Iterator[dict[str, Any]]:
    """The stored rows that the command line selects."""
    selected = {row_key(row.key) for row in planned}
    return (row for row in rows if row_key(row) in selected)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.table:
        print(table(read_rows(args.out)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if 0 < args.train_fraction < 1 and args.epochs == 1:
        as_many = f'--epochs {round(1 / args.train_fraction)}'
        print(f'one epoch over a share of the images; for the steps of a full epoch: {as_many}')
    planned = plan(args)
    benchmark = Benchmark(args, read_rows(args.out))
    todo = benchmark.missing(planned)
    print(f'{len(planned)} rows, {len(planned) - len(todo)} stored in {args.out}', flush=True)
    benchmark.run(todo)
    print(table(list(chosen(list(benchmark.rows.values()), planned))))
    if benchmark.failed:
        raise ConfigError(f'{len(benchmark.failed)} row(s) failed: {"; ".join(benchmark.failed)}')


if __name__ == '__main__':
    sys.exit(run_tool(main))
