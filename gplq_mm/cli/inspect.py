# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""`python -m gplq_mm inspect`: list every operation of a deployed model with its real precision."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ..analysis.report import format_table

LIBRARIES = {'.onnx': 'onnx', '.xml': 'openvino'}
"""Suffix -> folder of `integrations` whose ``precisions`` reads the executed graph."""
TORCH_FILES = ('.pth', '.safetensors')
PACKAGES = {'onnx': 'onnx onnxruntime', 'openvino': 'openvino'}
RED, PLAIN = '\033[31m', '\033[0m'
FLOAT_MARK = 'FLOAT'


class Row(NamedTuple):
    """One operation of the table.

    Attributes:
        operation: Its name.
        kind: Kind or operator.
        precision: What is multiplied.
        remark: Backend, and why others refuse it.
        is_float: Whether it is in the recipe's scope and runs in float.
    """

    operation: str
    kind: str
    precision: str
    remark: str
    is_float: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `inspect`.

    Args:
        parser: Parser of this sub-command.
    """
    parser.add_argument(
        'file', help='.onnx, .xml, or a checkpoint that holds its config; else the config'
    )
    parser.add_argument('checkpoint', nargs='?', help='gplq_final.pth or a packed file')
    parser.add_argument('--strict', action='store_true', help='exit with 1 for a float operation')
    parser.add_argument(
        '--engine', choices=('integer', 'simulated'), help='of a checkpoint; default: integer'
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs='+',
        help="height and width of a checkpoint's images, if its config does not name them",
    )


def run(args: argparse.Namespace) -> int:
    """Print the operations.

    Args:
        args: Parsed command line.

    Returns:
        1 with ``--strict`` if an operation of the recipe's scope runs in float, else 0.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is of another kind, or an option has no effect on it.
    """
    check(args)
    suffix = Path(args.file).suffix
    rows = list(runtime_rows(args.file) if suffix in LIBRARIES else torch_rows(args))
    sys.stdout.write(text_of(rows, colours=wants_colours(sys.stdout, os.environ)) + '\n')
    return int(args.strict and any(row.is_float for row in rows))


def check(args: argparse.Namespace) -> None:
    """Refuse a command line without sense, before a model is built.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: See ``run``.
    """
    for path in filter(None, (args.file, args.checkpoint)):
        if not Path(path).is_file():
            raise FileNotFoundError(f'no file at {Path(path).absolute()}')
    suffix = Path(args.file).suffix
    if suffix in LIBRARIES:
        given = [n for n in ('checkpoint', 'engine', 'size') if getattr(args, n) is not None]
        if given:
            raise ValueError(f'{given[0]} has no effect on {args.file}; give the file alone')
    elif suffix == '.py':
        if args.checkpoint is None or Path(args.checkpoint).suffix not in TORCH_FILES:
            raise ValueError(
                f'{args.file} is a config: write inspect {args.file} gplq_final.pth; '
                'an .onnx or .xml file is given alone'
            )
    elif suffix not in TORCH_FILES or args.checkpoint is not None:
        raise ValueError(
            'write inspect FILE.onnx, inspect FILE.xml, inspect CHECKPOINT.pth, '
            f'inspect CHECKPOINT.safetensors, or inspect CONFIG.py CHECKPOINT; got {args.file}'
            + (f' {args.checkpoint}' if args.checkpoint else '')
        )


def runtime_rows(path: str) -> Iterable[Row]:
    """Operations of the graph that onnxruntime or OpenVINO executes.

    Args:
        path: ``.onnx`` or ``.xml``.

    Raises:
        ValueError: If the runtime is not installed.
    """
    name = LIBRARIES[Path(path).suffix]
    try:
        found = import_module(f'gplq_mm.integrations.{name}').precisions(path)
    except ModuleNotFoundError as error:
        raise ValueError(f'{path}: {error}; write pip install {PACKAGES[name]}') from error
    for entry in found:
        is_float = 'float' in entry.precision and not entry.outside
        yield Row(entry.operation, entry.kind, entry.precision, entry.outside, is_float)


def torch_rows(args: argparse.Namespace) -> Iterable[Row]:
    """Operations of a checkpoint, as the dispatcher computes them.

    Args:
        args: Parsed command line.

    Raises:
        ValueError: If the checkpoint is not finished, or does not fit the config.
    """
    from ..api.deploying import deploy
    from ..deployment.operation_precision import operation_precisions
    from ..integrations.mm.deployment.example_pass import example_pass

    model = deploy(_model(args), args.engine or 'integer')
    for entry in operation_precisions(model, example_pass(model, args.size)):
        parts = [entry.backend, entry.reason]
        remark = ': '.join(part for part in parts if part)
        yield Row(entry.operation, entry.kind, entry.precision, remark, entry.is_float)


def _model(args: argparse.Namespace) -> Any:
    if args.checkpoint is None:
        from ..integrations.mm.checkpoints.quantized_model import QuantizedSource

        return QuantizedSource(args.file).quantized()
    from ..integrations.mm.deployment.finished_model import build_finished, read_finished
    from ..integrations.mm.launch.tools import load_config

    cfg = load_config(args.file)
    return build_finished(cfg, read_finished(cfg, args.file, args.checkpoint))


def text_of(rows: list[Row], colours: bool) -> str:
    """Table of the operations, and how many have each precision.

    Args:
        rows: Operations.
        colours: Whether float operations are red; they are marked in any case.
    """
    cells = [
        [row.operation, row.kind, row.precision, FLOAT_MARK if row.is_float else '', row.remark]
        for row in rows
    ]
    head, rule, *lines = format_table(['operation', 'kind', 'precision', '', ''], cells).split('\n')
    shown = [
        f'{RED}{line}{PLAIN}' if row.is_float and colours else line
        for row, line in zip(rows, lines, strict=True)
    ]
    counts = Counter(row.precision for row in rows)
    total = ', '.join(f'{number} {precision}' for precision, number in counts.most_common())
    floats = sum(row.is_float for row in rows)
    verdict = f'{floats} operations of the scope run in float' if floats else 'none runs in float'
    return '\n'.join([head, rule, *shown, f'{len(rows)} operations: {total}; {verdict}'])


def wants_colours(stream: Any, environment: Mapping[str, str]) -> bool:
    """Whether red is printed: in a terminal, unless ``NO_COLOR`` is set.

    Args:
        stream: Output.
        environment: Environment variables; ``FORCE_COLOR`` colours a pipe too.
    """
    if 'NO_COLOR' in environment:
        return False
    return 'FORCE_COLOR' in environment or stream.isatty()
