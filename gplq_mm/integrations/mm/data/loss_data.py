# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Test pipelines that also load labels, for losses without augmentation."""

import copy
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config


def with_labels(cfg: Config) -> Config:
    """Copy of a config whose test pipelines load annotations before they resize.

    Detectors' test pipelines load annotations last (in the original size) or not at all;
    a loss needs them in the size that the model sees. Other pipelines stay as they are.

    Args:
        cfg: The run's config.
    """
    own = copy.deepcopy(cfg)
    loaders = [own.get(f'{split}_dataloader') for split in ('train', 'val', 'test')]
    annotations = _find(loaders[0]) if loaders[0] else None
    if annotations is None:
        return own
    for loader in loaders[1:]:
        if loader:
            _move_annotations(loader['dataset'], annotations)
    return own


def _find(node: Any) -> Any:
    """The first transform that loads annotations, anywhere in a dataloader's config."""
    if isinstance(node, Mapping):
        if _loads(node, 'Annotations'):
            return dict(node)
        node = list(node.values())
    if isinstance(node, list | tuple):
        return next((found for item in node if (found := _find(item)) is not None), None)
    return None


def _move_annotations(dataset: Any, annotations: Mapping[str, Any]) -> None:
    for inner in dataset.get('datasets') or [dataset.get('dataset')]:
        if inner:
            _move_annotations(inner, annotations)
    if dataset.get('pipeline'):
        rest = [t for t in dataset['pipeline'] if not _loads(t, 'Annotations')]
        after = 1 + max((i for i, t in enumerate(rest) if _loads(t, 'Image')), default=-1)
        dataset['pipeline'] = [*rest[:after], dict(annotations), *rest[after:]]


def _loads(transform: Mapping[str, Any], what: str) -> bool:
    kind = transform.get('type')
    name = str(getattr(kind, '__name__', kind)).rpartition('.')[2]
    return name.startswith('Load') and what in name
