# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Compare recipes by accuracy: recipes x models x bits x seeds, on one data set, in one run.

    python tools/benchmarks/accuracy.py --recipes rtn direct paper ours --bits w4a4 w3a3 \
        --seeds 0 1 2 --out docs/benchmarks/accuracy.json
    python tools/benchmarks/accuracy.py --table --out docs/benchmarks/accuracy.json

Each row is a GPLQ run by config in a process of its own: calibration, stage 1, stage 2. Its
result is stored at once; a run that was killed goes on with the rows that are missing, and a
row whose recipe has changed since is run again. Rows that differ in the weights' settings only
share one stage 1. Variants of a recipe:

    --recipes ours 'ours-kd=ours:w3a3,optim.lr=1e-4,mimic.type=logits,schedule=constant'
"""

import argparse
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from accuracy_recipes import DEFAULT, RECIPES, Recipe, fingerprint, parse_recipe, stage1_part
from accuracy_table import read_rows, row_key, table, write_rows

from gplq_mm.engine.checkpoint import STAGE1_NAME, file_sha256
from gplq_mm.engine.launch import load_config, run_tool
from gplq_mm.engine.preflight import ConfigError
from gplq_mm.evaluation import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
OUT = Path('docs/benchmarks/accuracy.json')
WORK_ROOT = Path('work_dirs/accuracy')
FIGURES = ('fp32', 'stage1', 'stage2', 'seconds', 'peak_memory_bytes')
RESULT_NAME = 'result.json'
AMP = {'optim_wrapper.type': 'AmpOptimWrapper', 'optim_wrapper.dtype': 'bfloat16'}


@dataclass(frozen=True)
class Row:
    """One row to run.

    Attributes:
        key: `model`, `dataset`, `recipe`, `bits`, `seed`.
        job: What the sub-process is told.
        stage1_key: Equal for rows that can share a stage 1.
        fingerprint: Equal for rows that must give the same figures.
    """

    key: dict[str, Any]
    job: dict[str, Any]
    stage1_key: str
    fingerprint: str

    @property
    def work_dir(self) -> Path:
        return Path(self.job['work_dir'])

    def __str__(self) -> str:
        return ' '.join(map(str, self.key.values()))


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
    parser.add_argument('--train-fraction', type=float, default=1.0, help='of the training images')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast in stage 1')
    parser.add_argument('--metric', help="default: the evaluator's first")
    parser.add_argument('--out', type=Path, default=OUT, help='rows (JSON); default: %(default)s')
    parser.add_argument('--work-dir', type=Path, default=WORK_ROOT)
    parser.add_argument('--jobs', type=int, default=1, help='rows at a time')
    parser.add_argument('--threads', type=int, help='threads a row; default: cores / jobs')
    parser.add_argument('--force', action='store_true', help='run stored rows again')
    parser.add_argument('--table', action='store_true', help='print what is stored, run nothing')
    return parser.parse_args(argv)


def shared_root() -> Path:
    """Folder with `data/` and `models/`."""
    return Path(os.environ.get('GPLQ_DATA_ROOT', ROOT.parent / 'shared'))


def default_data() -> Path:
    """CIFAR-10, unzipped once into the cache.

    Raises:
        ConfigError: If the archive is absent.
    """
    cache = Path(os.environ.get('XDG_CACHE_HOME', Path.home() / '.cache'), 'gplq_mm', 'cifar10')
    if cache.is_dir():
        return cache
    archive = shared_root() / 'data/cifar10/cifar10_jpeg.zip'
    if not archive.is_file():
        raise ConfigError(f'no {archive}; give --data-root, or set GPLQ_DATA_ROOT')
    unfinished = cache.with_name(f'.cifar10.{os.getpid()}')
    with zipfile.ZipFile(archive) as file:
        file.extractall(unfinished)
    os.replace(unfinished, cache)
    return cache


def find_models(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Float configs and their checkpoints.

    Raises:
        ConfigError: If a file is absent.
    """
    given = args.models or [str(shared_root() / 'models/vit_cifar10.py')]
    found = []
    for text in given:
        config, _, checkpoint = text.partition('=')
        pair = (config, checkpoint or str(Path(config).with_suffix('.pth')))
        for path in pair:
            if not Path(path).is_file():
                raise ConfigError(f'no file {path}; write --models CONFIG=CHECKPOINT')
        found.append(pair)
    return found


def plan(args: argparse.Namespace) -> list[Row]:
    """All rows that the command line asks for, in the order of the table."""
    if not 0 < args.train_fraction <= 1:
        raise ConfigError(f'--train-fraction {args.train_fraction}: write a share in (0, 1]')
    recipes = [parse_recipe(text) for text in [*args.recipes, *args.recipe] or DEFAULT]
    data = str(default_data()) if args.data_root is None else args.data_root
    rows: dict[str, Row] = {}
    for config, checkpoint in find_models(args):
        cfg = load_config(config)
        name = args.dataset or Path(data or str(cfg.get('data_root') or 'data')).name
        base = {
            'config': os.path.abspath(config),
            'checkpoint': os.path.abspath(checkpoint),
            'data_root': data and os.path.abspath(data),
            'metric': args.metric,
            'train_fraction': args.train_fraction,
        }
        digest = file_sha256(checkpoint)
        batch = cfg.train_dataloader.get('batch_size', 1)
        for recipe in recipes:
            for bits in [recipe.bits] if recipe.bits else args.bits:
                for seed in args.seeds:
                    row = make_row(recipe, bits, seed, base, args, (name, digest, batch))
                    rows.setdefault(str(row), row)
    return list(rows.values())


def make_row(
    recipe: Recipe,
    bits: str,
    seed: int,
    base: dict[str, Any],
    args: argparse.Namespace,
    model: tuple[str, str | None, int],
) -> Row:
    """One row; `model` is the data set's name, the checkpoint's hash and the batch size."""
    dataset, digest, batch = model
    epochs = args.epochs if recipe.epochs is None else recipe.epochs
    resolved = recipe.resolve(bits, recipe.options.get('train_dataloader.batch_size', batch))
    label = recipe.name
    if args.train_fraction < 1:
        label += f'@{100 * args.train_fraction:g}%'
    if recipe.epochs is None and epochs != 1:
        label += f'@{epochs}ep'
    if args.amp and epochs:
        label += '@bf16'
    key = {
        'model': Path(base['config']).stem,
        'dataset': dataset,
        'recipe': label,
        'bits': bits,
        'seed': seed,
    }
    training = {
        'schedule': recipe.schedule,
        'epochs': epochs,
        'options': {**(AMP if args.amp and epochs else {}), **recipe.options},
        'seed': seed,
    }
    shared = [digest, base['data_root'], base['train_fraction'], training]
    folder = '-'.join(str(v).replace('/', '_') for v in key.values())
    stage1_key = fingerprint(*shared, stage1_part(resolved))
    job = {
        **base,
        **training,
        'recipe': resolved,
        'preset': recipe.preset(bits),
        'work_dir': os.path.abspath(args.work_dir / folder),
        'stage1_key': stage1_key,
    }
    return Row(key, job, stage1_key, fingerprint(*shared, resolved))


class Benchmark:
    """Runs rows and stores each as soon as it is there.

    Args:
        args: Command line.
        rows: What is stored already.
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
        """Rows that are not stored, or stand for a recipe that has changed since."""
        if self.args.force:
            return planned
        stored = {key: row.get('fingerprint') for key, row in self.rows.items()}
        return [row for row in planned if stored.get(row_key(row.key)) != row.fingerprint]

    def run(self, todo: list[Row]) -> None:
        """Run rows, those of one stage 1 after each other."""
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
        """End the sub-processes; no further one starts."""
        self.stopped = True
        for child in list(self.children):
            child.terminate()

    def _unit(self, rows: list[Row]) -> None:
        for row in rows:
            if not self.stopped:
                self._row(row)

    def _row(self, row: Row) -> None:
        # what the row's folder held is gone now
        self.stage1_dirs = {k: d for k, d in self.stage1_dirs.items() if d != row.work_dir}
        stage1_dir = self.stage1_dirs.get(row.stage1_key)
        job = {
            **row.job,
            'stage1_dir': stage1_dir and str(stage1_dir.absolute()),
            'evaluate_fp32': stage1_dir is None and self._fp32(row) is None,
        }
        print(f'{row} ...', flush=True)
        result = self._process(row, job)
        if result is None:
            return
        if stage1_dir is None:
            self.stage1_dirs[row.stage1_key] = row.work_dir
        self._store(row, result)

    def _process(self, row: Row, job: dict[str, Any]) -> dict[str, Any] | None:
        """Run the row in a process of its own; its output goes to `log.txt`."""
        row.work_dir.mkdir(parents=True, exist_ok=True)
        write_json(row.work_dir / 'job.json', job)
        threads = self.args.threads or max(1, (os.cpu_count() or 1) // self.args.jobs)
        environment = {
            **os.environ,
            'OMP_NUM_THREADS': str(threads),
            'MKL_NUM_THREADS': str(threads),
            'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
        }
        script = Path(__file__).with_name('accuracy_row.py')
        log = row.work_dir / 'log.txt'
        with log.open('w') as output:
            command = [sys.executable, str(script), str(row.work_dir / 'job.json')]
            child = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            self.children.add(child)
            code = child.wait()
            self.children.discard(child)
        if code != 0:
            if not self.stopped:
                last = log.read_text().strip().splitlines()[-1:] or ['']
                self.failed.append(f'{row}: exit code {code}: {last[0]} (see {log})')
                print(f'FAILED {self.failed[-1]}', flush=True)
            return None
        return read_json(row.work_dir / RESULT_NAME)

    def _fp32(self, row: Row) -> float | None:
        """FP32 score of the row's model and data, measured once for all rows."""
        key = (row.key['model'], row.key['dataset'])
        for known in self.rows.values():
            if (known['model'], known['dataset']) == key and known['fp32'] is not None:
                return known['fp32']
        return None

    def _store(self, row: Row, result: dict[str, Any]) -> None:
        with self.lock:
            fp32 = result['fp32'] if result['fp32'] is not None else self._fp32(row)
            figures = {name: result[name] for name in FIGURES}
            more = {k: v for k, v in result.items() if k not in figures and k != 'stage1_key'}
            stored = {
                **row.key,
                **figures,
                'fp32': fp32,
                **more,
                'epochs': row.job['epochs'],
                'train_fraction': row.job['train_fraction'],
                'fingerprint': row.fingerprint,
            }
            self.rows[row_key(stored)] = stored
            write_rows(self.args.out, list(self.rows.values()))
            shown = ' -> '.join(f'{stored[k]:.2f}' for k in ('fp32', 'stage1', 'stage2'))
            print(f'{row}: {shown}, {stored["seconds"]:.0f} s', flush=True)


def chosen(rows: list[dict[str, Any]], planned: list[Row]) -> Iterator[dict[str, Any]]:
    """The stored rows that the command line asks for."""
    wanted = {row_key(row.key) for row in planned}
    return (row for row in rows if row_key(row) in wanted)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.table:
        print(table(read_rows(args.out)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
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
