# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Checks before long work; each fails with one line that says what to write instead."""

import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.checkpoint_io import fetch, read_checkpoint
from .errors import ConfigError
from .settings_check import SPLITS, has_gplq_hook

_URL = re.compile(r'^[\w-]+://')
_DOWNLOADED = ('https://', 'http://', 'file://')
_DOWNLOADS = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')
_QUANTIZER_KEY = re.compile(r'_quantizer\.(scale|calibrated)$')
_GIVE_FLOAT = 'give the FP32 checkpoint with --cfg-options load_from=PATH_OR_URL'


def is_url(path: str) -> bool:
    """Whether a path is a URL that MMEngine downloads: ``https://``, ``open-mmlab://``, ..."""
    return _URL.match(path) is not None


def check_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of any kind; a URL is left to MMEngine.

    Args:
        path: File or URL.

    Returns:
        Its state dict; empty for a URL.

    Raises:
        ConfigError: If the file is missing, truncated, damaged or no checkpoint.
    """
    if not isinstance(path, str | Path):
        raise ConfigError(f'{path!r} is no checkpoint; write a path or a URL')
    if is_url(str(path)):
        return {}
    try:
        _check_archive(Path(path))
        return read_checkpoint(path)['state_dict']
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(' '.join(str(error).split())) from error


def downloaded(path: str | Path) -> str | Path:
    """A checkpoint's local file, downloaded if it is a web address.

    MMEngine loads what it downloads without torch's protection against code in a file. The file
    lies where MMEngine looks for it, and ``check_checkpoint`` reads it with the protection first.

    Args:
        path: File, web address, or name of a zoo (``open-mmlab://x``).

    Returns:
        The local file; ``path`` itself for a zoo's name, which MMEngine resolves, and where another
        process of the machine downloads.

    Raises:
        ConfigError: If the download fails.
    """
    is_first = os.environ.get('LOCAL_RANK', '0') == '0'
    if not (str(path).startswith(_DOWNLOADED) and is_first):
        return path
    try:
        return fetch(str(path))
    except FileNotFoundError as error:
        raise ConfigError(' '.join(str(error).split())) from error


def check_float_checkpoint(path: str | Path | None, remedy: str = _GIVE_FLOAT) -> None:
    """Refuse an FP32 checkpoint that GPLQ cannot start from.

    Args:
        path: ``load_from`` of the config: file or URL.
        remedy: What to do instead, for the message.

    Raises:
        ConfigError: If there is none, the file is missing, truncated or damaged, or it was
            written by a GPLQ run.
    """
    if not path:
        raise ConfigError(f'GPLQ starts from a trained float model, load_from is empty; {remedy}')
    try:
        state = check_checkpoint(path)
    except ConfigError as error:
        raise ConfigError(f'{error}; {remedy}') from error
    quantizers = _quantizer_keys(state)
    if quantizers:
        raise ConfigError(
            f'{path} is quantized already ({len(quantizers)} quantizer keys, first '
            f'{quantizers[0]}); {remedy}'
        )


def check_float_model(config: str, checkpoint: str | Path, state: Mapping[str, Any]) -> None:
    """Refuse to score the weights of a quantized checkpoint in a float model.

    Args:
        config: Path of a config whose model is float, for the message.
        checkpoint: Path of the checkpoint, for the message.
        state: Its state dict.

    Raises:
        ConfigError: If the state dict holds quantizers, which the float model would ignore.
    """
    if _quantizer_keys(state):
        raise ConfigError(
            f'{checkpoint} is quantized, but the model of {config} is float and would ignore its '
            'quantizers; give the GPLQ config that the checkpoint was made with'
        )


def require_hook(cfg: Any) -> None:
    """Add the GPLQ hook to a config without it.

    The hook refuses checkpoints of another recipe and logs what is quantized.

    Args:
        cfg: GPLQ config, changed in place.
    """
    if not has_gplq_hook(cfg):
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='gplq_mm.GPLQHook')]


def check_data(cfg: Mapping[str, Any], splits: Sequence[str] = SPLITS) -> None:
    """Refuse a config whose data sets do not exist.

    Looks at annotation files, image folders and data roots of the dataloaders, inside wrappers
    such as ``RepeatDataset`` too, and at the evaluators' annotation files. URLs are not checked.

    Args:
        cfg: The run's config.
        splits: Which of ``train``, ``val`` and ``test`` the run uses.

    Raises:
        ConfigError: If a path does not exist; the message names all missing ones, each once.
    """
    missing: dict[str, str] = {}
    for split in splits:
        dataloader = cfg.get(f'{split}_dataloader')
        for dataset in _datasets((dataloader or {}).get('dataset')):
            _find_missing(dataset, f'{split}_dataloader', missing)
        for evaluator in _listed(cfg.get(f'{split}_evaluator')):
            path = evaluator.get('ann_file') if isinstance(evaluator, Mapping) else None
            _note(path, f'{split}_evaluator.ann_file', missing)
    if missing:
        found = ', '.join(f'{path} ({where})' for path, where in missing.items())
        raise ConfigError(
            f'data not found: {found}; give its folder with --cfg-options data_root=DIR'
        )


def key_mismatch(model: nn.Module, state: Mapping[str, Any]) -> str:
    """Load weights and describe the keys that do not fit.

    Args:
        model: Float model; takes the weights that fit.
        state: State dict of a checkpoint; a prefix ``module.`` is ignored.

    Returns:
        Keys that are missing, unexpected or of another shape; empty if all fit.
    """
    state = {re.sub(r'^module\.', '', key): value for key, value in state.items()}
    shapes: list[str] = []
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        shapes = re.findall(r'size mismatch for ([\w.]+)', str(error))
        own = model.state_dict()
        missing = [key for key in own if key not in state]
        unexpected = [key for key in state if key not in own]
    else:
        missing, unexpected = result.missing_keys, result.unexpected_keys
    found = {'missing': missing, 'unexpected': unexpected, 'of another shape': shapes}
    return '; '.join(f'{len(keys)} {how}: {_some(keys)}' for how, keys in found.items() if keys)


def _quantizer_keys(state: Mapping[str, Any]) -> list[str]:
    return [key for key in state if _QUANTIZER_KEY.search(key)]


def _check_archive(path: Path) -> None:
    """Detect a truncated zip file, and compare its checksums, which ``torch.load`` does not.

    Files from before torch 1.6 are no zip files and pass.
    """
    if not path.is_file():
        return
    with path.open('rb') as file:
        begins_as_zip = file.read(4) == b'PK\x03\x04'
    if not zipfile.is_zipfile(path):
        if begins_as_zip:
            raise ValueError(
                f'{path.absolute()} is truncated: it ends after {path.stat().st_size} bytes'
            )
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f'{path.absolute()} is damaged: {error}') from error
    if damaged:
        raise ValueError(f'{path.absolute()} is damaged: wrong checksum of {damaged}')


def _listed(value: Any) -> list[Any]:
    if not value:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _datasets(cfg: Any) -> Iterator[Mapping[str, Any]]:
    """The data sets inside wrappers (``dataset=``) and concatenations (``datasets=``)."""
    for dataset in _listed(cfg):
        inner = dataset.get('datasets') or dataset.get('dataset')
        if inner:
            yield from _datasets(inner)
        else:
            yield dataset


def _find_missing(dataset: Mapping[str, Any], where: str, missing: dict[str, str]) -> None:
    """Collect missing paths of a data set: its root alone, or each path below it."""
    if str(dataset.get('type')).split('.')[-1] in _DOWNLOADS and dataset.get('download', True):
        return
    root = dataset.get('data_root') or ''
    if root and not is_url(root) and not Path(root).exists():
        _note(root, f'{where}.dataset.data_root', missing)
        return
    paths = {'ann_file': dataset.get('ann_file')}
    prefix = dataset.get('data_prefix') or {}
    if isinstance(prefix, str):
        paths['data_prefix'] = prefix
    else:
        paths.update({f'data_prefix.{key}': path for key, path in prefix.items()})
    for key, path in paths.items():
        if isinstance(path, str) and path and not is_url(root):
            _note(
                path if is_url(path) else str(Path(root, path)), f'{where}.dataset.{key}', missing
            )


def _note(path: Any, where: str, missing: dict[str, str]) -> None:
    """Collect a missing path, unless its folder is collected already."""
    if not isinstance(path, str) or not path or is_url(path) or Path(path).exists():
        return
    full = Path(path).absolute()
    if not any(Path(noted) in full.parents for noted in missing):
        missing.setdefault(str(full), where)


def _some(keys: Sequence[str]) -> str:
    more = f' and {len(keys) - 4} more' if len(keys) > 4 else ''
    return ', '.join(keys[:4]) + more
