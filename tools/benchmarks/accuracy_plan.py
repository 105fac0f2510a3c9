# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The rows that the command line of `accuracy.py` selects."""

import argparse
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accuracy_recipes import DEFAULT, Recipe, fingerprint, parse_recipe, settled, stage1_part

from gplq_mm.integrations.mm.checkpoints.run_checkpoint import file_sha256
from gplq_mm.integrations.mm.launch.errors import ConfigError
from gplq_mm.integrations.mm.launch.tools import load_config

ROOT = Path(__file__).resolve().parents[2]
RESULT_NAME = 'result.json'
AMP = {'optim_wrapper.type': 'AmpOptimWrapper', 'optim_wrapper.dtype': 'bfloat16'}


@dataclass(frozen=True)
class Row:
    """One row to run.

    Attributes:
        key: `model`, `dataset`, `recipe`, `bits`, `seed`.
        job: Arguments of the sub-process.
        stage1_key: Equal for rows that can share a stage 1.
        fingerprint: Equal for rows that must give the same results.
    """

    key: dict[str, Any]
    job: dict[str, Any]
    stage1_key: str
    fingerprint: str

    @property
    def work_dir(self) -> Path:
        return Path(self.job['work_dir'])

    @property
    def is_transfer(self) -> bool:
        return 'transfer_root' in self.job

    def __str__(self) -> str:
        return ' '.join(map(str, self.key.values()))


@dataclass(frozen=True)
class FloatModel:
    """Data common to all rows of one float model.

    Attributes:
        dataset: Name of the images it is trained and scored on.
        digest: Hash of its checkpoint.
        batch: Training images per step in its config.
        library: Its `default_scope`, such as `mmdet`.
    """

    dataset: str
    digest: str | None
    batch: int
    library: str | None

    @property
    def is_dense(self) -> bool:
        """Whether it is a detector or a segmentor."""
        return self.library in ('mmdet', 'mmseg')


def shared_root() -> Path:
    """Folder with `data/` and `models/`."""
    return Path(os.environ.get('GPLQ_DATA_ROOT', ROOT.parent / 'shared'))


def default_data() -> Path:
    """CIFAR-10, unzipped once into the cache.

    Raises:
        ConfigError: If the archive does not exist.
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
        ConfigError: If a file does not exist.
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
    """All rows that the command line selects, in the order of the table."""
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
        model = FloatModel(name, digest, batch, cfg.get('default_scope'))
        for recipe in recipes:
            for bits in [recipe.bits] if recipe.bits else args.bits:
                for seed in args.seeds:
                    row = make_row(recipe, bits, seed, base, args, model)
                    same = rows.setdefault(str(row), row)
                    if same.job['checkpoint_sha256'] != digest:
                        raise ConfigError(
                            f'two models are called {row.key["model"]}; rename one config'
                        )
                    if args.transfer:
                        probes = transfer_row(row, find_transfer(args.transfer))
                        rows.setdefault(str(probes), probes)
    return list(rows.values())


def find_transfer(given: str) -> Path:
    """Folder of the probes' images.

    Raises:
        ConfigError: If it does not exist.
    """
    for folder in (Path(given), shared_root() / 'data' / given):
        if (folder / 'train').is_dir() and (folder / 'test').is_dir():
            return folder.absolute()
    raise ConfigError(f'--transfer {given}: no such folder with train/ and test/')


def transfer_row(row: Row, root: Path) -> Row:
    """The row of the probes on a finished row's backbones."""
    job = {
        **row.job,
        'transfer_root': str(root),
        'result': str(row.work_dir / f'transfer_{root.name}.json'),
        'base': str(row),
    }
    key = {**row.key, 'dataset': root.name}
    return Row(key, job, row.stage1_key, fingerprint(row.fingerprint, root.name))


def make_row(
    recipe: Recipe,
    bits: str,
    seed: int,
    base: dict[str, Any],
    args: argparse.Namespace,
    model: FloatModel,
) -> Row:
    """One row of the table."""
    epochs = args.epochs if recipe.epochs is None else recipe.epochs
    resolved = recipe.resolve(bits, recipe.options.get('train_dataloader.batch_size', model.batch))
    label = recipe.name
    if args.train_fraction < 1:
        label += f'@{100 * args.train_fraction:g}%'
    if recipe.epochs is None and epochs != 1:
        label += f'@{epochs}ep'
    if args.amp and epochs:
        label += '@bf16'
    key = {
        'model': Path(base['config']).stem,
        'dataset': model.dataset,
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
    shared = [model.digest, model.dataset, base['train_fraction'], training]
    meant = settled(resolved, model.is_dense, has_logits=model.library != 'mmdet')
    folder = '-'.join(str(v).replace('/', '_') for v in key.values())
    stage1_key = fingerprint(*shared, stage1_part(meant))
    job = {
        **base,
        **training,
        'recipe': resolved,
        'preset': recipe.preset(bits),
        'work_dir': os.path.abspath(args.work_dir / folder),
        'checkpoint_sha256': model.digest,
        'stage1_key': stage1_key,
        'result': str(args.work_dir.absolute() / folder / RESULT_NAME),
        'fingerprint': fingerprint(*shared, meant),
    }
    return Row(key, job, stage1_key, job['fingerprint'])
