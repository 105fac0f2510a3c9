# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What `tools/train.py`, `test.py` and `ptq.py` share: arguments, config, runner, errors."""

import argparse
import linecache
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.dataset import BaseDataset
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ....compat.installed import check_versions
from ....quantizers import UncalibratedError
from ..checkpoints.resume import resumable_checkpoint
from .config import apply_cfg_options
from .cpu_launch import prepare_cpu_launch
from .cpu_memory import keep_freed_memory
from .library_ways import set_mmpretrain_dataloaders
from .preflight import ConfigError

USER_ERROR = 2
_LIBRARIES = ('mmdet', 'mmpretrain', 'mmseg')
PACKAGE = Path(__file__).resolve().parents[3]
_MISTAKES = (ValueError, TypeError, FileNotFoundError, FileExistsError, UncalibratedError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all tools have."""
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder for logs, checkpoints and the report')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='settings to override, as key=value; a.b=value for nested ones, key="[a,b]" for '
        "lists. data_root=DIR moves all paths below the config's data_root",
    )
    launchers = ('none', 'pytorch', 'slurm', 'mpi')
    parser.add_argument('--launcher', choices=launchers, default='none', help='job launcher')
    # torch.distributed.launch passes the one or the other, depending on torch's version
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def read_config(args: argparse.Namespace) -> Config:
    """Read the config and apply the arguments that all tools have.

    Args:
        args: Parsed by a parser that ``add_arguments`` filled.

    Returns:
        The config, with ``work_dir`` and ``launcher`` set.

    Raises:
        ConfigError: If the config or one of its base configs cannot be found.
        ImportError: If installed libraries clash, or one that the config needs is missing.
    """
    check_versions()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = load_config(args.config)
    scope = cfg.get('default_scope', 'mmengine')
    needed = {lib for lib in _LIBRARIES if scope == lib or f"'{lib}." in str(cfg.get('model'))}
    if needed:
        check_versions('mmcv', *sorted(needed))
    if args.cfg_options:
        apply_cfg_options(cfg, args.cfg_options)
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
        ConfigError: If the file or one of its base configs cannot be found.
    """
    if not Path(path).is_file():
        raise ConfigError(f'no config at {Path(path).absolute()}')
    try:
        return Config.fromfile(path)
    except FileNotFoundError as error:
        raise ConfigError(f'{path} builds on a config that does not exist: {error}') from error
    except ImportError as error:
        what = str(error).splitlines()[0]
        raise ConfigError(
            f'{path} needs a module that cannot be imported: {what}; see python -m gplq_mm '
            'doctor, and set PYTHONPATH if it is a module of yours'
        ) from error


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
        ConfigError: If the checkpoint to resume from does not exist.
    """
    if resume is None:
        return None
    if resume != 'auto':
        if not Path(resume).is_file():
            raise ConfigError(f'--resume: no checkpoint at {Path(resume).absolute()}')
        cfg.resume, cfg.load_from = True, resume
        return None
    latest = latest_checkpoint(cfg.work_dir)
    if latest is None:
        cfg.resume = False
        start = cfg.get('load_from') or 'random weights'
        return f'--resume: no checkpoint in {cfg.work_dir}; starting from {start}'
    cfg.resume, cfg.load_from = True, str(latest)
    return None


def latest_checkpoint(work_dir: str | Path) -> Path | None:
    """Latest checkpoint of a work dir, even if the folder was moved; None if there is none.

    Raises:
        ConfigError: If ``last_checkpoint`` names a file that does not exist.
    """
    named = resumable_checkpoint(work_dir)
    if not named:
        return None
    for path in (Path(named), Path(work_dir, Path(named).name)):
        if path.is_file():
            return path
    raise ConfigError(
        f'--resume: {Path(work_dir, "last_checkpoint")} names {named}, which does not exist; '
        'write --resume CHECKPOINT'
    )


def build_runner(cfg: Config) -> Runner:
    """Build the runner that the config names, MMEngine's own by default."""
    keep_freed_memory()
    prepare_cpu_launch(cfg)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def run_tool(main: Callable[[], None]) -> int:
    """Run a tool; a user's mistake ends in one line, anything else keeps its traceback.

    Args:
        main: The tool.

    Returns:
        The exit code: 0, or 2 for a user's mistake.
    """
    try:
        main()
    except (*_MISTAKES, ImportError) as error:
        empty = empty_data_set(error)
        if not (empty or is_refusal(error)):
            raise
        sys.stderr.write(f'error: {empty or error}\n')
        return USER_ERROR
    return 0


def empty_data_set(error: BaseException) -> str | None:
    """Explain the NumPy error that MMEngine raises for a data set without images.

    Args:
        error: What a tool raised.

    Returns:
        The explanation; None if the error is another.
    """
    trace = error.__traceback__
    while trace is not None:
        dataset = trace.tb_frame.f_locals.get('self')
        if isinstance(dataset, BaseDataset) and not getattr(dataset, 'data_list', True):
            where = dataset.ann_file or dataset.data_prefix
            return (
                f'{type(dataset).__name__} has no images: {where}; compare metainfo.classes with '
                'the names in the annotations, and check filter_cfg and indices'
            )
        trace = trace.tb_next
    return None


def is_refusal(error: BaseException) -> bool:
    """Whether a ``raise`` statement of this package raised the error."""
    if isinstance(error, ConfigError):
        return True
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    filename = trace.tb_frame.f_code.co_filename
    line = linecache.getline(filename, trace.tb_lineno)
    return PACKAGE in Path(filename).resolve().parents and line.lstrip().startswith('raise ')
