# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Train a config of mmdet, mmpretrain or mmseg: GPLQ's two stages, or a float model.

Example:
    python tools/train.py configs/gplq/mask_rcnn_swin-t_w4a4.py --cfg-options data_root=data/coco
"""

import argparse
import sys
from collections.abc import Sequence

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.logging import print_log

from gplq_mm.integrations.mm.launch.errors import ConfigError, run_tool
from gplq_mm.integrations.mm.launch.settings_check import is_gplq, require_gplq_hook
from gplq_mm.integrations.mm.launch.tools import (
    add_arguments,
    build_runner,
    read_config,
    set_resume,
)

CONSTRUCTOR = 'gplq_mm.GPLQOptimWrapperConstructor'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train a model: GPLQ by a GPLQ config')
    add_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from a checkpoint; without a path, from the latest in the work dir',
    )
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size'
    )
    return parser.parse_args(argv)


def set_amp(cfg: Config) -> None:
    """Turn on automatic mixed precision, dynamic loss scale unless the config gives one.

    Raises:
        ConfigError: If there is no accelerator and the optimizer is not GPLQ's. GPLQ's supports
            bfloat16 on a CPU; MMEngine alone has no mixed precision there.
    """
    if get_device() == 'cpu' and cfg.optim_wrapper.get('constructor') != CONSTRUCTOR:
        raise ConfigError(
            '--amp: MMEngine has mixed precision on accelerators only; leave it out, or write '
            f"optim_wrapper=dict(constructor='{CONSTRUCTOR}') in a GPLQ config"
        )
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def set_auto_scale_lr(cfg: Config) -> None:
    """Turn on MMEngine's scaling of the learning rate.

    Raises:
        ConfigError: If the config does not give the batch size of its learning rate.
    """
    if not cfg.get('auto_scale_lr', {}).get('base_batch_size'):
        raise ConfigError(
            '--auto-scale-lr: the config has no auto_scale_lr.base_batch_size; give it with '
            '--cfg-options auto_scale_lr.base_batch_size=16'
        )
    cfg.auto_scale_lr.enable = True


def check(cfg: Config) -> None:
    """Check the arguments before the long start-up."""
    from gplq_mm.integrations.mm.launch.preflight import (
        check_checkpoint,
        check_data,
        check_float_checkpoint,
        downloaded,
    )

    check_data(cfg, ('train', 'val'))
    path = cfg.get('load_from') and downloaded(cfg.load_from)
    if is_gplq(cfg) and not (cfg.get('resume') and path):
        check_float_checkpoint(path)
    elif path:
        check_checkpoint(path)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = read_config(args, splits=('train',))
    if args.amp:
        set_amp(cfg)
    if args.auto_scale_lr:
        cfg.setdefault('auto_scale_lr', ConfigDict())
        set_auto_scale_lr(cfg)
    warning = set_resume(cfg, args.resume)
    check(cfg)
    require_gplq_hook(cfg, args.config)
    runner = build_runner(cfg)
    if warning:
        print_log(warning, logger='current', level=30)
    runner.train()


if __name__ == '__main__':
    sys.exit(run_tool(main, '--resume'))
