# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The command line that the scripts in `tools/model_converters` share."""

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmengine.registry import init_default_scope
from torch import Tensor

from ....registry import MODELS
from ..checkpoints.checkpoint_io import read_checkpoint, write_checkpoint
from ..checkpoints.quantized_model import float_model_config
from ..launch.config import read_file

Converter = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]


def convert_file(source: str, out: Path, config: Path, convert: Converter) -> int:
    """Convert a checkpoint for the float model of a config.

    Args:
        source: Checkpoint of another project, or its URL.
        out: File to write.
        config: Config whose float model the weights must fit, key by key.
        convert: Function of the source's and the target's state dict that returns the converted
            one.

    Returns:
        Number of tensors written.

    Raises:
        FileNotFoundError: If ``source`` or ``config`` is missing.
        ValueError: If ``source`` cannot be read or does not fit.
    """
    checkpoint = read_checkpoint(source)
    cfg = read_file(config)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model = MODELS.build(float_model_config(cfg.model))
    weights = convert(checkpoint['state_dict'], model.state_dict())
    found = dict(checkpoint.get('meta') or {})
    meta: dict[str, Any] = {'converted_from': Path(source).name}
    if 'dataset_meta' in found or 'CLASSES' in found:
        meta['dataset_meta'] = found.get('dataset_meta') or {'classes': found['CLASSES']}
    write_checkpoint({'state_dict': weights, 'meta': meta}, out)
    return len(weights)


def main(about: str, url: str, config: Path, out: str, convert: Converter) -> None:
    """Parse the command line and convert.

    Args:
        about: Description of the script.
        url: URL of the public checkpoint.
        config: Default float config of the target.
        out: Default output file.
        convert: As in `convert_file`.
    """
    parser = ArgumentParser(description=about, epilog=f'The public checkpoint: {url}')
    parser.add_argument('source', nargs='?', default=url, help='its file, or the URL it is at')
    parser.add_argument('out', nargs='?', default=out, type=Path, help='(default: %(default)s)')
    parser.add_argument('--config', default=config, type=Path, help='float config of the target')
    args = parser.parse_args()
    try:
        count = convert_file(args.source, args.out, args.config, convert)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f'{error}\n')
    sys.stdout.write(f'{count} tensors -> {args.out}\n')
