# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Watchers of a validation: predictions of its first images, and accuracy by class."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import get_world_size
from mmengine.logging import print_log

from ....analysis import read_json, write_json
from ..runner_types import DataLoop
from .plain_prediction import plain_prediction

Watcher = Callable[[Any, Sequence[Any]], None]
"""Gets a batch as the data loader gave it, and the model's data samples."""
LOG_NAME = 'gplq_fp32_predictions.json'
MOST_NUMBERS = 100_000
"""Numbers that a log may hold: some megabytes of JSON, whatever the size of the data set."""


class PredictionLog:
    """Predictions of a validation's first images as plain data.

    Attributes:
        images: ``plain_prediction`` of each.
    """

    def __init__(self) -> None:
        self.images: list[dict[str, Any] | None] = []
        self.room = MOST_NUMBERS

    def watch(self, batch: Any, samples: Sequence[Any]) -> None:
        """Keep a batch's predictions, while there is room."""
        for sample in samples:
            if self.room <= 0:
                return
            found = plain_prediction(sample)
            self.images.append(found)
            self.room -= 4 + 6 * len((found or {}).get('boxes', ()))

    def write(self, work_dir: str | Path) -> None:
        """Write ``gplq_fp32_predictions.json``, which outlives the process."""
        write_json(Path(work_dir) / LOG_NAME, {'images': self.images})


def read_log(work_dir: str | Path) -> list[dict[str, Any] | None]:
    """Predictions of the FP32 model that this run or an earlier process wrote; may be empty."""
    images: list[dict[str, Any] | None] = read_json(Path(work_dir) / LOG_NAME).get('images', [])
    return images


class ClassAccuracy:
    """Accuracy of a classifier by class, over all images of one process."""

    def __init__(self, classes: Sequence[str] | None) -> None:
        self.classes = classes
        self.counts: dict[int, list[int]] = {}

    def watch(self, batch: Any, samples: Sequence[Any]) -> None:
        """Count a batch's predictions."""
        for sample in samples:
            found = plain_prediction(sample)
            if found and found.get('truth') is not None:
                right = self.counts.setdefault(found['truth'], [0, 0])
                right[0] += found['label'] == found['truth']
                right[1] += 1

    def as_dict(self) -> dict[str, float]:
        """Percent of right images by class name; empty for other models and on several ranks."""
        if get_world_size() > 1:
            return {}
        return {
            class_name(self.classes, label): 100 * right / total
            for label, (right, total) in sorted(self.counts.items())
        }


def class_name(classes: Sequence[str] | None, label: int) -> str:
    """Name of a class, or its number.

    Examples:
        >>> class_name(['cat'], 0), class_name(None, 3)
        ('cat', 'class 3')
    """
    known = classes is not None and 0 <= label < len(classes)
    return str(classes[label]) if classes is not None and known else f'class {label}'


def classes_of(loop: DataLoop | None) -> Sequence[str] | None:
    """Class names of a loop's data set, if it has any."""
    dataset = loop.dataloader.dataset if loop is not None else None
    names: Sequence[str] | None = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    return names


def all_or_log(watchers: Sequence[Watcher]) -> Watcher:
    """One watcher that calls several; one that fails is logged and not called again.

    A picture of the report is no reason to stop a validation: data samples of other projects may
    hold anything.
    """
    active = list(watchers)

    def watch(batch: Any, samples: Sequence[Any]) -> None:
        for watcher in list(active):
            try:
                watcher(batch, samples)
            except Exception as error:
                active.remove(watcher)
                print_log(f'predictions are left out of the report: {error!r}', logger='current')

    return watch
