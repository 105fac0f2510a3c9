# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Whether model, data sets and annotations agree about the classes."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.fileio import load
from mmengine.logging import print_log

from ..launch.errors import ConfigError
from ..model_structure import class_counts

_WRITE = 'write metainfo=dict(classes=(...)) with the classes that the float model was trained on'


def check_classes(model: Any, datasets: Mapping[str, Any]) -> None:
    """Refuse data whose labels mean other classes than the model's, before long work.

    Training and scores would go on with them, and their figures would mean nothing.

    Args:
        model: Network with its heads.
        datasets: Built data sets of a run by split: ``train``, ``val``, ``test``. Those without
            ``metainfo['classes']`` are not checked.

    Raises:
        ConfigError: If a data set has another number of classes than a head, names classes that
            its annotation file does not have, or has no object (for ``test`` this is a warning); or
            if ``train`` and ``val`` have other classes.
    """
    for split, dataset in datasets.items():
        where = f'{split}_dataloader: {type(dataset).__name__}'
        _require_number(class_counts(model), dataset, where)
        for part in _parts(dataset):
            _require_annotated(part, where)
        if all(_has_no_object(part) for part in _parts(dataset)):
            text = (
                f'{where} has {len(dataset)} images and no object in them; compare its ann_file '
                'with its metainfo.classes'
            )
            if split != 'test':  # predictions can be written for images without annotations
                raise ConfigError(text)
            print_log(text, logger='current', level=logging.WARNING)
    names = {split: _names(dataset) for split, dataset in datasets.items()}
    train, val = names.get('train'), names.get('val')
    if train and val and sorted(train) != sorted(val):
        raise ConfigError(
            f'train_dataloader has the classes {_some(train)}, val_dataloader has {_some(val)}; '
            f'{_WRITE} in both'
        )


def _require_number(counts: Mapping[str, int], dataset: Any, where: str) -> None:
    names = _names(dataset)
    if not names:
        return
    things = getattr(dataset, 'metainfo', {}).get('thing_classes') or names
    for head, number in counts.items():
        if number in (len(names), len(things)):
            continue
        if number < len(names) and _labels_below(dataset, number):
            continue
        raise ConfigError(
            f'{where} has {len(names)} classes ({_some(names)}), {head} of the model has '
            f'{number}; {_WRITE}'
        )


def _require_annotated(dataset: Any, where: str) -> None:
    """Refuse class names that a COCO annotation file does not have: others would move up."""
    names, found = _names(dataset), getattr(dataset, 'cat_ids', None)
    if not names or found is None or len(found) >= len(names):
        return
    categories = [item['name'] for item in load(dataset.ann_file).get('categories', [])]
    unknown = [name for name in names if name not in categories]
    raise ConfigError(
        f'{where} names the classes {_some(unknown)}, which {dataset.ann_file} does not have: its '
        f'categories are {_some(categories)}; {_WRITE}, spelled as there'
    )


def _has_no_object(dataset: Any) -> bool:
    """Whether a detection set has no box to learn or to find; stops at the first one."""
    if not hasattr(dataset, 'get_data_info') or not len(dataset):
        return False
    infos = (dataset.get_data_info(index) for index in range(len(dataset)))
    return not any(
        'instances' not in info or any(not item.get('ignore_flag') for item in info['instances'])
        for info in infos
    )


def _labels_below(dataset: Any, number: int) -> bool:
    """Whether a classification set has labels of the first classes only."""
    if not hasattr(dataset, 'get_data_info'):
        return False
    labels = (dataset.get_data_info(index).get('gt_label') for index in range(len(dataset)))
    return all(isinstance(label, int) and label < number for label in labels)


def _names(dataset: Any) -> Sequence[str]:
    return (getattr(dataset, 'metainfo', None) or {}).get('classes') or ()


def _parts(dataset: Any) -> Iterator[Any]:
    """The data sets inside wrappers and concatenations."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner == [None]:
        yield dataset
    else:
        for one in inner:
            yield from _parts(one)


def _some(names: Sequence[str]) -> str:
    more = f' and {len(names) - 5} more' if len(names) > 5 else ''
    return ', '.join(map(str, names[:5])) + more
