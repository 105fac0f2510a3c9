# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Score a quantized or float checkpoint, or a deployed file, with its config.

Examples:
    python tools/test.py configs/gplq/mask_rcnn_swin-t_w4a4.py work_dirs/x/gplq_final.pth
    python tools/test.py CONFIG work_dirs/x/gplq_final.pth --engine integer
    python tools/test.py CONFIG work_dirs/x/detector.onnx --heads work_dirs/x/gplq_final.pth
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.fileio import dump
from mmengine.registry import METRICS
from mmengine.runner import Runner

from gplq_mm.integrations.mm.checkpoints.run_checkpoint import unwrap
from gplq_mm.integrations.mm.deployment.engine_choice import (
    ENGINES,
    TORCH_ENGINES,
    choose_engine,
    heads_checkpoint,
    set_inference_,
    use_file_,
)
from gplq_mm.integrations.mm.launch.errors import ConfigError
from gplq_mm.integrations.mm.launch.library_ways import show_predictions, wrap_for_tta
from gplq_mm.integrations.mm.launch.preflight import (
    check_checkpoint,
    check_data,
    check_float_model,
    downloaded,
    require_hook,
)
from gplq_mm.integrations.mm.launch.settings_check import is_gplq
from gplq_mm.integrations.mm.launch.tools import add_arguments, build_runner, read_config, run_tool


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Score a checkpoint')
    add_arguments(parser)
    parser.add_argument(
        'checkpoint', help='gplq_final.pth, gplq_stage1.pth, or a file of tools/deploy.py'
    )
    parser.add_argument(
        '--engine', choices=ENGINES, help='what computes the model; all give the same metrics'
    )
    parser.add_argument(
        '--heads',
        metavar='FILE.pth',
        help="checkpoint of a detector's heads, for an .onnx or .xml file",
    )
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions, or the metrics')
    parser.add_argument(
        '--out-item', choices=('pred', 'metrics'), default='pred', help='what --out writes'
    )
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='draw predictions into this folder')
    parser.add_argument(
        '--wait-time', type=float, default=2.0, help='seconds that a window is shown'
    )
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    return parser.parse_args(argv)


def check_out(args: argparse.Namespace) -> None:
    """Refuse an output file that cannot be written after the test.

    Raises:
        ConfigError: If its suffix does not fit the content.
    """
    endings = ('.pkl', '.pickle') if args.out_item == 'pred' else ('.json', '.yaml', '.pkl')
    if args.out and not args.out.endswith(endings):
        raise ConfigError(
            f'--out {args.out}: {args.out_item} go into a file *{" or *".join(endings)}'
        )


def prepare_engine(cfg: Config, args: argparse.Namespace) -> bool:
    """Set the engine of a config; whether the file is an exported one.

    Raises:
        ConfigError: If engine, file and other arguments do not fit together.
    """
    chosen = choose_engine(cfg, args.config, args.checkpoint, args.engine)
    exported = chosen is not None and chosen not in TORCH_ENGINES
    if args.heads and not exported:
        raise ConfigError(f'--heads has no effect on {args.checkpoint}; remove it')
    if exported and args.tta:
        raise ConfigError('--tta does not run exported files; give the checkpoint')
    if chosen in TORCH_ENGINES:
        set_inference_(cfg, chosen)
    return exported


def dump_predictions(runner: Runner, cfg: Config, path: str) -> None:
    """Write the test's predictions, mmdet's masks as run lengths."""
    kind = 'mmdet.DumpDetResults' if cfg.get('default_scope') == 'mmdet' else 'DumpResults'
    runner.test_evaluator.metrics.append(METRICS.build(dict(type=kind, out_file_path=path)))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    check_out(args)
    cfg = read_config(args, splits=('test',))
    exported = prepare_engine(cfg, args)
    cfg.resume = False
    if exported:
        cfg.load_from = heads_checkpoint(cfg, args.checkpoint, args.heads)
    else:
        cfg.load_from = args.checkpoint
        state = check_checkpoint(downloaded(args.checkpoint))
    if is_gplq(cfg):
        require_hook(cfg)
    else:
        check_float_model(args.config, args.checkpoint, state)
    check_data(cfg, ('test',))
    if args.show or args.show_dir:
        show_predictions(cfg, args.show, args.show_dir, args.wait_time)
    if args.tta:
        wrap_for_tta(cfg, draws=bool(args.show or args.show_dir))
    runner = build_runner(cfg)
    if exported:
        runner.load_or_resume()
        use_file_(unwrap(runner.model), args.checkpoint)
    if args.out and args.out_item == 'pred':
        dump_predictions(runner, cfg, args.out)
    metrics = runner.test()
    if args.out and args.out_item == 'metrics':
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        dump(metrics, args.out)


if __name__ == '__main__':
    sys.exit(run_tool(main))
