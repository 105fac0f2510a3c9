# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What `tools/train.py`, `test.py` and `ptq.py` share: arguments, config, runner, errors."""

import argparse
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.config import Config, DictAction
from mmengine.logging import print_log

from ....compat.installed import check_versions
from ....compat.mmengine import brief_runner
from ....recipe import as_recipe
from .config import apply_cfg_options, read_file
from .errors import USER_ERROR, ConfigError, is_refusal, run_tool
from .library_ways import set_mmpretrain_dataloaders
from .settings_check import check_settings, is_gplq, make_work_dir

if TYPE_CHECKING:
    from mmengine.runner import Runner

__all__ = ['USER_ERROR', 'ConfigError', 'is_refusal', 'run_tool']

_LIBRARIES = ('mmdet', 'mmpretrain', 'mmseg')


class Options(DictAction):
    """``--cfg-options`` of MMEngine's tools; a word without ``=`` is an error in one line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Parse ``key=value`` words."""
        for word in values:
            if not word.partition('=')[0] or '=' not in word:
                raise argparse.ArgumentError(self, f'{word!r} is no setting; write key=value')
        super().__call__(parser, namespace, values, option_string)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all tools have."""
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder for logs, checkpoints and the report')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=Options,
        help='settings to override, as key=value; a.b=value for nested ones, key="[a,b]" for '
        "lists. data_root=DIR moves all paths below the config's data_root",
    )
    launchers = ('none', 'pytorch', 'slurm', 'mpi')
    parser.add_argument('--launcher', choices=launchers, default='none', help='job launcher')
    # torch.distributed.launch passes the one or the other, depending on torch's version
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def read_config(args: argparse.Namespace, splits: Sequence[str] | None = None) -> Config:
    """Read the config, apply the arguments that all tools have, and check its settings.

    Args:
        args: Parsed by a parser that ``add_arguments`` filled.
        splits: Which of ``train``, ``val`` and ``test`` the tool runs; None checks no settings.

    Returns:
        The config, with ``work_dir`` and ``launcher`` set.

    Raises:
        ConfigError: If the config or one of its base configs cannot be read, or no run can have
            one of its settings.
        ValueError: If its recipe is wrong.
        ImportError: If installed libraries clash, or one that the config needs is missing.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = load_config(args.config)
    if args.cfg_options:
        apply_cfg_options(cfg, args.cfg_options)
    # mistakes in the config before the libraries are imported, which takes seconds
    if splits is not None:
        check_settings(cfg, args.config, splits)
    if is_gplq(cfg) and 'recipe' in cfg.model:
        recipe = as_recipe(cfg.model.recipe)
        print_log(f'GPLQ: recipe {recipe.name}, {args.config}')
    check_versions()
    scope = cfg.get('default_scope', 'mmengine')
    needed = {lib for lib in _LIBRARIES if scope == lib or f"'{lib}." in str(cfg.get('model'))}
    if needed:
        check_versions('mmcv', *sorted(needed))
    if scope == 'mmpretrain':  # last: without workers there are none to keep alive
        set_mmpretrain_dataloaders(cfg)
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    cfg.launcher = args.launcher
    return cfg


def load_config(path: str | Path) -> Config:
    """Read a config file.

    Args:
        path: A file; not a `package::` name.

    Raises:
        ConfigError: If the file or one of its base configs cannot be found or read.
    """
    if not Path(path).is_file():
        raise ConfigError(f'no config at {Path(path).absolute()}')
    try:
        return read_file(path)
    except FileNotFoundError as error:
        raise ConfigError(f'{path} builds on a config that does not exist: {error}') from error
    except ImportError as error:
        what = str(error).splitlines()[0]
        raise ConfigError(
            f'{path} needs a module that cannot be imported: {what}; see python -m gplq_mm '
            'doctor, and set PYTHONPATH if it is a module of yours'
        ) from error
    except Exception as error:  # a config is a program, which can raise anything
        what = ' '.join(str(error).split())
        raise ConfigError(
            f'{path} cannot be read: {type(error).__name__}: {what}{_line_of(error)}'
        ) from error


def _line_of(error: BaseException) -> str:
    """Where a config raised an error; empty if its text says it or the reader raised it."""
    if isinstance(error, SyntaxError) or error.__traceback__ is None:
        return ''
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f' (line {where.lineno}: {where.line})' if where.name == '<module>' else ''


def set_resume(cfg: Config, resume: str | None) -> str | None:
    """Decide what a training starts from.

    With ``resume`` and an empty ``load_from`` MMEngine resumes from the latest checkpoint of the
    work dir, or starts from random weights if there is none. Here a given ``load_from`` is used if
    there is none.

    Args:
        cfg: Config with its ``work_dir``; changed in place.
        resume: Path of a checkpoint, ``auto`` for the latest in the work dir, None for no resume.

    Returns:
        A warning if there was nothing to resume.

    Raises:
        ConfigError: If the checkpoint to resume from does not exist or cannot be read.
    """
    if resume is None:
        return None
    if resume != 'auto':
        if not Path(resume).is_file():
            raise ConfigError(f'--resume: no checkpoint at {Path(resume).absolute()}')
        cfg.resume, cfg.load_from = True, resume
        return None
    from ..checkpoints.resume import resumable_checkpoint

    latest = resumable_checkpoint(cfg.work_dir)
    if latest is None:
        cfg.resume = False
        start = cfg.get('load_from') or 'random weights'
        return f'--resume: no checkpoint in {cfg.work_dir}; starting from {start}'
    cfg.resume, cfg.load_from = True, latest
    return None


def build_runner(cfg: Config) -> 'Runner':
    """Build the runner that the config names, MMEngine's own by default.

    Raises:
        ConfigError: If nothing can be written to the work dir.
    """
    from mmengine.registry import RUNNERS

    from .cpu_launch import prepare_cpu_launch
    from .cpu_memory import keep_freed_memory

    make_work_dir(cfg.work_dir)
    keep_freed_memory()
    prepare_cpu_launch(cfg)
    if 'runner_type' in cfg:
        return RUNNERS.build(cfg)
    runner = brief_runner().from_cfg(cfg)
    print_log(f'environment, config and hooks: {runner.log_dir}/*.log', logger='current')
    return runner
