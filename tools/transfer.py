# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Linear probes on another data set: a quantized backbone compared with its FP32 backbone.

Without --train the features of unaugmented images are extracted once, which takes seconds; with
--train both probes are trained as the config says, augmentation and stochastic depth included.

Example:
    python tools/transfer.py configs/gplq/pets_transfer.py work_dirs/X/gplq_final.pth --seeds 0 1 2
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.fileio import dump
from mmengine.logging import print_log
from mmengine.registry import init_default_scope

from gplq_mm.analysis.linear_probe import ProbeSettings
from gplq_mm.integrations.mm.launch.errors import ConfigError
from gplq_mm.integrations.mm.launch.preflight import check_checkpoint, check_data
from gplq_mm.integrations.mm.launch.tools import add_arguments, read_config, run_tool
from gplq_mm.integrations.mm.studies.transfer import transfer, transfer_by_training


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Transfer of a quantized backbone')
    add_arguments(parser)
    parser.add_argument('checkpoint', help='gplq_final.pth of a GPLQ run')
    parser.add_argument('--fp32', metavar='PATH', help='FP32 checkpoint; default: the recorded one')
    parser.add_argument('--train', action='store_true', help='train as the config says')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='one probe each')
    parser.add_argument('--epochs', type=int, help="instead of the config's")
    parser.add_argument('--out', metavar='FILE.json', help='default: transfer.json in the work dir')
    return parser.parse_args(argv)


def check(cfg: Config, args: argparse.Namespace) -> None:
    """Check the arguments before the long start-up.

    Raises:
        ConfigError: If the config is no probe, or a file is missing.
    """
    if cfg.model.get('type') != 'gplq_mm.LinearProbe':
        raise ConfigError(
            f"{args.config} has no model of type 'gplq_mm.LinearProbe'; take one of "
            'configs/gplq/*_transfer.py'
        )
    check_checkpoint(args.checkpoint)
    if args.fp32:
        check_checkpoint(args.fp32)
    check_data(cfg, ('train', 'val'))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = read_config(args, splits=())
    check(cfg, args)
    if args.epochs:
        cfg.train_cfg.max_epochs = args.epochs
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    if args.train:
        cfg.model.fp32_checkpoint = args.fp32
        result = transfer_by_training(cfg, args.checkpoint, args.seeds)
    else:
        settings = ProbeSettings(
            epochs=cfg.train_cfg.max_epochs,
            lr=cfg.optim_wrapper.optimizer.lr,
            batch_size=cfg.train_dataloader.batch_size,
        )
        result = transfer(
            cfg,
            args.checkpoint,
            model=cfg.model.get('model'),
            fp32_checkpoint=args.fp32,
            seeds=args.seeds,
            settings=settings,
        )
    out = Path(args.out or Path(cfg.work_dir) / 'transfer.json')
    out.parent.mkdir(parents=True, exist_ok=True)
    dump(result.as_dict(), out)
    print_log(f'{result.table()}\n-> {out}', logger=None)


if __name__ == '__main__':
    sys.exit(run_tool(main))
