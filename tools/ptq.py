# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Stage 2 only: quantize the weights of a stage-1 checkpoint, score it, write the final one.

Several algorithms are compared in one table, each from the same checkpoint; `+` joins algorithms
that run one after another. The rows are stored in gplq_stage2.json in the work dir.

Example:
    python tools/ptq.py CONFIG work_dirs/x/gplq_stage1.pth --ptq mse gptq gptq+bias_correction
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner

from gplq_mm.integrations.mm.launch.errors import ConfigError
from gplq_mm.integrations.mm.launch.preflight import check_checkpoint, check_data
from gplq_mm.integrations.mm.launch.settings_check import is_gplq
from gplq_mm.integrations.mm.launch.tools import add_arguments, build_runner, read_config, run_tool
from gplq_mm.integrations.mm.studies.ptq_comparison import PTQComparison
from gplq_mm.ptq import build_weight_ptq
from gplq_mm.ptq.labels import parse_ptq


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='GPLQ stage 2 only')
    add_arguments(parser)
    parser.add_argument('checkpoint', help='stage-1 checkpoint: gplq_stage1.pth')
    parser.add_argument(
        '--ptq',
        nargs='+',
        metavar='NAME',
        default=[None],
        help="weight algorithm instead of the recipe's, or several joined by + that run one after "
        'another (repq+gptq), with options if needed: "gptq(asymmetric=True)"; with more than '
        'one NAME each starts from the checkpoint',
    )
    parser.add_argument(
        '--bits',
        type=int,
        help="weight bits instead of the recipe's, 2 to 8; bits of rules do not change",
    )
    parser.add_argument(
        '--out', metavar='FILE', help='final checkpoint; gplq_final.pth in the work dir by default'
    )
    return parser.parse_args(argv)


def check(cfg: Config, args: argparse.Namespace) -> None:
    """Check the arguments before the long start-up.

    Raises:
        ConfigError: If the config is no GPLQ config, ``--out`` is given for several
            algorithms, an algorithm is unknown, or the checkpoint or the data does not exist.
    """
    if not is_gplq(cfg):
        raise ConfigError(
            f'{args.config} has no model of type gplq_mm.GPLQ; write a GPLQ config with '
            'python -m gplq_mm init'
        )
    if args.out and len(args.ptq) > 1:
        raise ConfigError('--out names one file; with several --ptq leave it out')
    for name in filter(None, args.ptq):
        try:
            build_weight_ptq(parse_ptq(name))
        except ValueError as error:
            raise ConfigError(f'--ptq {name}: {error}') from None
    if args.bits is not None and not 2 <= args.bits <= 8:
        raise ConfigError(f'--bits {args.bits}: write a number from 2 to 8')
    check_checkpoint(args.checkpoint)
    check_data(cfg, ('train', 'val'))


def final_name(args: argparse.Namespace, cfg: Config, ptq: str | None) -> str:
    """Path of the final checkpoint of one algorithm."""
    if args.out:
        return args.out
    return f'{cfg.work_dir}/gplq_final{f"_{ptq}" if len(args.ptq) > 1 else ""}.pth'


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = read_config(args, splits=())
    check(cfg, args)
    cfg.load_from, cfg.resume = args.checkpoint, False
    runner: Runner = build_runner(cfg)
    runner.call_hook('before_run')
    runner.load_checkpoint(args.checkpoint)
    comparison = PTQComparison(runner, args.checkpoint, Path(args.config).stem)
    for name in args.ptq:
        comparison.run(name, final_name(args, cfg, name), args.bits, resume=len(args.ptq) > 1)
        print_log(f'stage 2 compared:\n{comparison.table()}', logger='current')
    runner.call_hook('after_run')


if __name__ == '__main__':
    sys.exit(run_tool(main))
