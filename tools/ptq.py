# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Stage 2 alone: quantize the weights of a stage-1 checkpoint, score it, write the final one.

Example:
    python tools/ptq.py CONFIG work_dirs/x/gplq_stage1.pth --ptq mse percentile
"""

import argparse
import sys
from collections.abc import Sequence

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner

from gplq_mm.engine import stage2
from gplq_mm.engine.launch import add_arguments, build_runner, read_config, run_tool
from gplq_mm.engine.preflight import ConfigError, check_checkpoint, check_data, is_gplq


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='GPLQ stage 2 alone')
    add_arguments(parser)
    parser.add_argument('checkpoint', help='stage-1 checkpoint: gplq_stage1.pth')
    parser.add_argument(
        '--ptq',
        nargs='+',
        metavar='NAME',
        default=[None],
        help="weight algorithm in place of the recipe's; several are tried one after the other",
    )
    parser.add_argument(
        '--out', metavar='FILE', help='final checkpoint; gplq_final.pth in the work dir by default'
    )
    return parser.parse_args(argv)


def check(cfg: Config, args: argparse.Namespace) -> None:
    """Refuse what would fail after a long start.

    Raises:
        ConfigError: If the config is no GPLQ config, ``--out`` stands for several files, or
            the checkpoint or the data is not there.
    """
    if not is_gplq(cfg):
        raise ConfigError(
            f'{args.config} has no model of type gplq_mm.GPLQ; write a GPLQ config with '
            'python -m gplq_mm init'
        )
    if args.out and len(args.ptq) > 1:
        raise ConfigError('--out names one file; with several --ptq leave it out')
    check_checkpoint(args.checkpoint)
    check_data(cfg, ('train', 'val'))


def final_name(args: argparse.Namespace, cfg: Config, ptq: str | None) -> str:
    """Path of the final checkpoint of one algorithm."""
    if args.out:
        return args.out
    return f'{cfg.work_dir}/gplq_final{f"_{ptq}" if len(args.ptq) > 1 else ""}.pth'


def log_scores(scores: dict[str, dict[str, float]]) -> None:
    """Log the metrics of several algorithms side by side."""
    for name, metrics in scores.items():
        line = '  '.join(f'{key} {value:.4f}' for key, value in metrics.items())
        print_log(f'{name}: {line}', logger='current')


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = read_config(args)
    check(cfg, args)
    cfg.load_from, cfg.resume = args.checkpoint, False
    runner: Runner = build_runner(cfg)
    runner.call_hook('before_run')
    scores = {}
    for name in args.ptq:
        runner.load_checkpoint(args.checkpoint)  # each algorithm starts from stage 1
        out = final_name(args, cfg, name)
        scores[name or 'recipe'] = stage2.run(runner, ptq=name, out=out)
    runner.call_hook('after_run')
    log_scores(scores)


if __name__ == '__main__':
    sys.exit(run_tool(main))
