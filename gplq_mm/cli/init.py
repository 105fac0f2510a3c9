# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""`python -m gplq_mm init`: write the GPLQ config of a project's trained float model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import CheckpointLoader

from ..compat.installed import check_versions, is_installed
from ..compat.mmengine import is_lazy_config
from ..convert import PRESETS, resolve_recipe
from ..integrations.mm.launch.errors import ConfigError
from ..integrations.mm.launch.preflight import (
    check_checkpoint,
    check_float_checkpoint,
    is_url,
    key_mismatch,
)
from ..integrations.mm.launch.settings_check import is_gplq
from ..integrations.mm.launch.tools import load_config
from .gplq_config import config_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `init`.

    Args:
        parser: Parser of this sub-command.
    """
    parser.add_argument('config', help='config that trained the float model')
    parser.add_argument('--checkpoint', required=True, help='trained float model: file or URL')
    parser.add_argument('--recipe', default='w4a4', help=f'one of {", ".join(sorted(PRESETS))}')
    parser.add_argument('-o', '--out', required=True, type=Path, help='GPLQ config to write')
    parser.add_argument('--force', action='store_true', help='overwrite OUT')


def run(args: argparse.Namespace) -> int:
    """Check that config and checkpoint fit, and write the GPLQ config.

    Args:
        args: Parsed command line.

    Returns:
        0.

    Raises:
        ConfigError: If a file is missing, OUT exists already, the config is a GPLQ config, or
            the checkpoint does not fit the float model.
        ValueError: If the recipe is unknown.
    """
    resolve_recipe(args.recipe)
    check_out(args)
    cfg = read_float_config(args.config)
    check_fits(cfg, args.config, args.checkpoint)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    base = args.config
    if is_lazy(base):
        base = write_flat(cfg, args.out)
        cfg = load_config(base)
    args.out.write_text(config_text(cfg, base, args.checkpoint, args.recipe, args.out))
    load_config(args.out)  # check that the config can be read
    sys.stdout.write(f'wrote {args.out}; next: python tools/train.py {args.out}\n')
    return 0


def check_out(args: argparse.Namespace) -> None:
    """Refuse to overwrite a file.

    Raises:
        ConfigError: If OUT is no Python file, exists already, or is the float config.
    """
    if args.out.suffix != '.py':
        raise ConfigError(f'-o {args.out}: a config is a Python file, write -o {args.out}.py')
    if args.out.resolve() == Path(args.config).resolve():
        raise ConfigError(f'-o {args.out} is the float config itself; write another name')
    if args.out.exists() and not args.force:
        raise ConfigError(f'{args.out} exists already; --force overwrites it')


def read_float_config(config: str) -> Config:
    """Read a config file, or one that is part of an installed library.

    Args:
        config: Path, or a name such as `mmdet::retinanet/retinanet_r50_fpn_1x_coco.py`.

    Raises:
        ConfigError: If it cannot be found, or the installed libraries are incompatible.
    """
    try:
        check_versions()
    except ImportError as error:
        raise ConfigError(str(error)) from error
    if '::' not in config:
        return load_config(config)
    if not is_installed(config.split('::')[0]):
        raise ConfigError(f'{config}: pip install {config.split("::")[0]}')
    return get_config(config)


def check_fits(cfg: Config, config: str, checkpoint: str) -> None:
    """Refuse a checkpoint that is not of the config's model.

    Args:
        cfg: The float config.
        config: Its path, for the message.
        checkpoint: File or URL.

    Raises:
        ConfigError: If keys are missing, unexpected or of another shape, or the config has no
            float model.
    """
    if is_gplq(cfg) or not cfg.get('model'):
        raise ConfigError(f'{config} has no float model to start from; give the float config')
    check_float_checkpoint(checkpoint, 'give the trained float model with --checkpoint')
    if is_url(checkpoint):
        loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
        state = loaded.get('state_dict', loaded)
    else:
        state = check_checkpoint(checkpoint)
    try:
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
            model = MODELS.build(cfg.model)
    except (KeyError, ImportError) as error:
        raise ConfigError(f'the model of {config} cannot be built: {error}') from error
    problems = key_mismatch(model, state)
    if problems:
        raise ConfigError(f'{checkpoint} does not fit the model of {config}: {problems}')


def is_lazy(config: str) -> bool:
    """Whether a config is of MMEngine's import style, which `_base_` cannot name."""
    return '::' not in config and is_lazy_config(config)


def write_flat(cfg: Config, out: Path) -> str:
    """Write a config of the import style as a flat file that `_base_` can name."""
    base = out.with_name(f'{out.stem}_float.py')
    cfg.dump(base)
    return str(base)
