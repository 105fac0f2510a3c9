# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The formats of ``tools/deploy.py``, as a table: another format is another row."""

import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from ....compat.installed import is_installed
from ..launch.errors import ConfigError

Write = Callable[[nn.Module, Config, Namespace, Path], list[Path]]


@dataclass(frozen=True)
class Format:
    """One output format.

    Attributes:
        suffix: Suffix of its file, which chooses the format unless ``--format`` does.
        write: ``write(model, cfg, args, out)`` writes and verifies the file, and returns all files
            of the format. A failed call leaves no file at ``out``.
        options: Arguments of the tool, beyond those of every format, that have an effect on it.
        packages: Packages that it needs.
        test_options: What ``tools/test.py`` needs beyond config and file.
    """

    suffix: str
    write: Write
    options: frozenset[str] = frozenset()
    packages: tuple[str, ...] = ()
    test_options: str = ''


def _write_packed(model: nn.Module, cfg: Config, args: Namespace, out: Path) -> list[Path]:
    from .packed_format import write_packed

    return write_packed(model, cfg, args, out)


def _write_onnx(model: nn.Module, cfg: Config, args: Namespace, out: Path) -> list[Path]:
    from .runtime_formats import write_onnx

    return write_onnx(model, cfg, args, out)


def _write_openvino(model: nn.Module, cfg: Config, args: Namespace, out: Path) -> list[Path]:
    from .runtime_formats import write_openvino

    return write_openvino(model, cfg, args, out)


FORMATS: dict[str, Format] = {
    'pth': Format('.pth', _write_packed, frozenset({'fp16'})),
    'safetensors': Format('.safetensors', _write_packed, frozenset({'fp16'})),
    'onnx': Format(
        '.onnx',
        _write_onnx,
        frozenset({'onnx_style', 'sizes'}),
        ('onnx', 'onnxscript', 'onnxruntime'),
        '--engine onnxruntime',
    ),
    'openvino': Format(
        '.xml',
        _write_openvino,
        frozenset({'sizes'}),
        ('onnx', 'onnxscript', 'openvino'),
        '--engine openvino',
    ),
}
"""Formats by their name in ``--format``."""
FORMAT_OPTIONS: dict[str, Any] = {'fp16': False, 'onnx_style': None, 'sizes': None}
"""Arguments of single formats, with the value that means "not given"."""


def choose_format(args: Namespace) -> Format:
    """The format of the command line.

    Args:
        args: ``out``, ``format`` or None, and ``FORMAT_OPTIONS``.

    Raises:
        ConfigError: If the suffix names no format or another one than ``--format``, a package is
            missing, or an argument has no effect on the format.
    """
    suffix = Path(args.out).suffix
    by_suffix = {row.suffix: name for name, row in FORMATS.items()}
    name = args.format or by_suffix.get(suffix)
    if name is None or FORMATS[name].suffix != suffix:
        allowed = FORMATS[name].suffix if name else ', '.join(by_suffix)
        raise ConfigError(
            f'-o {args.out}: the suffix {suffix!r} names {"another" if name else "no"} format; '
            f'write a name that ends with {allowed}'
        )
    chosen = FORMATS[name]
    missing = [package for package in chosen.packages if not is_installed(package)]
    if missing:
        raise ConfigError(
            f'format {name} needs {", ".join(missing)}; write pip install {" ".join(missing)}'
        )
    for option, unset in FORMAT_OPTIONS.items():
        if getattr(args, option, unset) != unset and option not in chosen.options:
            users = [n for n, row in FORMATS.items() if option in row.options]
            raise ConfigError(
                f'--{option.replace("_", "-")} has no effect on format {name}, only on '
                f'{", ".join(users)}; remove it'
            )
    return chosen


def check_output(out: str | Path, source: str | Path) -> None:
    """Refuse a file that cannot be written, before long work.

    Args:
        out: File to write.
        source: Checkpoint that is read; it is not overwritten, since stage 2 can be repeated only
            from unpacked files.

    Raises:
        ConfigError: If ``out`` is the source or a folder, or its folder cannot be written.
    """
    out = Path(out)
    if out.exists() and Path(source).exists() and out.samefile(source):
        raise ConfigError(f'-o {out} is the checkpoint itself; write another name')
    if out.is_dir():
        raise ConfigError(f'-o {out} is a folder; write a file name')
    folder = next(p for p in out.absolute().parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = 'cannot be written' if folder.is_dir() else 'is no folder'
        raise ConfigError(f'-o {out}: {folder} {what}; write a name in another folder')
