# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Read a config file, and override a value that it has many copies of.

A config is a Python file: ``data_root`` is copied into every data set when the file is read, and
``image_size`` into every transform, before MMEngine merges ``--cfg-options``. So ``--cfg-options
data_root=...`` of MMEngine's tools changes a variable that is not read any more. The functions here
change the copies too.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike, fspath
from typing import Any

from mmengine.config import Config, ConfigDict

from ....compat.mmengine import merging_over_names

GPLQ_TYPES = ('gplq_mm.GPLQ', 'GPLQ')
"""Types of a model that the builder makes."""
_NO_DATA = ('load_from', 'work_dir')


def apply_cfg_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Merge command-line options; ``data_root`` and ``image_size`` change all their copies.

    Args:
        cfg: Config to change in place.
        options: Values of ``--cfg-options``: dotted names and their values. Options for one place
            take precedence over options for all copies.

    Raises:
        ValueError: If the config has no ``data_root`` or ``image_size`` to replace.
    """
    rest = dict(options)
    if 'data_root' in rest:
        override_data_root(cfg, rest.pop('data_root'))
    if 'image_size' in rest:
        override_image_size(cfg, rest.pop('image_size'))
    with presets_merge():
        cfg.merge_from_dict(rest)


def read_file(path: str | PathLike[str]) -> Config:
    """Read a config file; a recipe's dict merges over a preset's name in its base config.

    Args:
        path: A config file of any kind that MMEngine reads.
    """
    with presets_merge():
        return Config.fromfile(path)


def presets_merge() -> AbstractContextManager[None]:
    """Context manager: keys of a recipe merge over the name of a preset."""
    return merging_over_names(GPLQ_TYPES, 'recipe', 'base')


def override_data_root(cfg: Config, new_root: str | PathLike[str]) -> None:
    """Move every path under the config's ``data_root`` to another folder.

    Args:
        cfg: Config to change in place.
        new_root: The folder; it need not exist.

    Raises:
        ValueError: If the config has no ``data_root``, or an empty one.

    Example:
        >>> cfg = Config(dict(data_root='data/coco/', ann='data/coco/a.json', x='data/coco2'))
        >>> override_data_root(cfg, '/mnt/coco')
        >>> cfg.data_root, cfg.ann, cfg.x
        ('/mnt/coco/', '/mnt/coco/a.json', 'data/coco2')
    """
    old = str(cfg.get('data_root') or '').rstrip('/')
    new = fspath(new_root).rstrip('/')
    if not old or not new:
        raise ValueError(
            f'cannot replace data_root={cfg.get("data_root")!r} by {fspath(new_root)!r}; write '
            'train_dataloader.dataset.data_root=... (and val_, test_, val_evaluator.ann_file=...)'
        )

    def move(value: Any) -> Any:
        if isinstance(value, str) and (value == old or value.startswith(f'{old}/')):
            return new + value[len(old) :]
        return value

    for key in set(cfg) - set(_NO_DATA):
        cfg[key] = _replace(cfg[key], move)


def override_image_size(cfg: Config, new_size: int | Sequence[int]) -> None:
    """Replace the config's ``image_size`` in every transform and in the model.

    A plain ViT takes any size, so the backbone keeps its ``img_size`` and its checkpoint fits.

    Args:
        cfg: Config to change in place.
        new_size: Width and height in pixels; one number for a square.

    Raises:
        ValueError: If the config has no ``image_size``, or ``new_size`` is no size.

    Example:
        >>> cfg = Config(dict(image_size=(1024, 1024), crop=dict(crop_size=(1024, 1024))))
        >>> override_image_size(cfg, 256)
        >>> cfg.image_size, cfg.crop.crop_size
        ((256, 256), (256, 256))
    """
    new = (new_size, new_size) if isinstance(new_size, int) else tuple(new_size)
    if len(new) != 2 or not all(isinstance(side, int) and side > 0 for side in new):
        raise ValueError(f'image_size must be one or two positive integers, got {new_size!r}')
    if 'image_size' not in cfg:
        raise ValueError(
            f'the config has no `image_size` to replace by {new}; name each transform instead, '
            'as in train_dataloader.dataset.pipeline.2.scale=...'
        )
    old = tuple(cfg.image_size)

    def resize(value: Any) -> Any:
        return new if isinstance(value, (tuple, list)) and tuple(value) == old else value

    for key in list(cfg):
        cfg[key] = _replace(cfg[key], resize)


def _replace(node: Any, swap: Callable[[Any], Any]) -> Any:
    """Copy nested dicts and lists with ``swap`` applied to each part, outermost first."""
    swapped = swap(node)
    if swapped is not node:
        return swapped
    if isinstance(node, dict):
        return ConfigDict({key: _replace(value, swap) for key, value in node.items()})
    if isinstance(node, (list, tuple)):
        return type(node)(_replace(value, swap) for value in node)
    return node
