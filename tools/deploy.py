# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Write a finished checkpoint in a format for deployment, and verify the file.

`.pth` and `.safetensors` are packed checkpoints: integer weight codes, at four bits an eighth of a
weight's size, and the same outputs bit for bit. Every tool that takes a checkpoint takes them.
`.onnx` and `.xml` (OpenVINO) hold a whole classifier, or backbone and neck of a detector.

Example:
    python tools/deploy.py CONFIG work_dirs/x/gplq_final.pth -o work_dirs/x/detector_w4a4.pth
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.logging import print_log

from gplq_mm.analysis import model_bytes
from gplq_mm.analysis.report import format_table
from gplq_mm.convert.model_facts import facts_of
from gplq_mm.integrations.mm.deployment.finished_model import (
    build_finished,
    float_parts,
    read_finished,
)
from gplq_mm.integrations.mm.deployment.formats import FORMATS, check_output, choose_format
from gplq_mm.integrations.mm.launch.tools import add_arguments, read_config, run_tool


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Write a finished checkpoint for deployment')
    add_arguments(parser)
    parser.add_argument('checkpoint', help='gplq_final.pth of a run, or a packed file')
    suffixes = ', '.join(row.suffix for row in FORMATS.values())
    parser.add_argument(
        '-o', '--out', metavar='FILE', required=True, help=f'file to write, with suffix {suffixes}'
    )
    parser.add_argument(
        '--format', choices=tuple(FORMATS), help="instead of the one of the file's suffix"
    )
    parser.add_argument(
        '--fp16',
        action='store_true',
        help='packed files: store biases, norms and float layers in float16; outputs then differ '
        'slightly',
    )
    parser.add_argument(
        '--onnx-style',
        choices=('integer', 'qdq'),
        help='ONNX: integer products for onnxruntime (default), or symmetric int8 between '
        'QuantizeLinear and DequantizeLinear for TensorRT (untested there)',
    )
    parser.add_argument(
        '--sizes',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='ONNX, OpenVINO: the one size of images that the file accepts; by default the '
        "classifier's img_size or 224, and any size for a detector where torch can export it",
    )
    return parser.parse_args(argv)


def size_table(files: Sequence[Path], checkpoint: str, packed_bytes: int) -> str:
    """Bytes of the files, of the checkpoint and of the report.

    Args:
        files: Files written.
        checkpoint: Checkpoint that was read.
        packed_bytes: ``model_bytes`` of the report.
    """
    paths = [path for path in (*files, Path(checkpoint)) if path.is_file()]  # not for a URL
    rows = [(str(path), path.stat().st_size) for path in paths]
    rows.append(("report's model_bytes", packed_bytes))
    lines = [[name, f'{size:,}', f'{size / packed_bytes:.3f}'] for name, size in rows]
    return format_table(['file', 'bytes', 'x model_bytes'], lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    chosen = choose_format(args)
    check_output(args.out, args.checkpoint)
    cfg = read_config(args, splits=())
    model = build_finished(cfg, read_finished(cfg, args.config, args.checkpoint))
    for line in float_parts(model):
        print_log(line)
    files = chosen.write(model, cfg, args, Path(args.out))
    table = size_table(files, args.checkpoint, model_bytes(model))
    test = Path(sys.argv[0]).with_name('test.py')
    options = chosen.test_options
    if options and facts_of(model).is_detector:  # the file has no heads
        options += f' --heads {args.checkpoint}'
    command = f'python {test} {args.config} {args.out} {options}'.rstrip()
    print_log(f'verified: the file gives the model\n{table}\nnext: {command}')


if __name__ == '__main__':
    sys.exit(run_tool(main))
