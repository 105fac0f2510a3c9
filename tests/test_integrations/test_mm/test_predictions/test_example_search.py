# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The images on which two models differ most, from their data samples."""

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip('mmengine')

from mmengine.structures import BaseDataElement, InstanceData
from PIL import Image

from gplq_mm.integrations.mm.predictions.example_search import MOST_EXAMPLES, ExampleSearch
from gplq_mm.integrations.mm.predictions.prediction_log import (
    ClassAccuracy,
    PredictionLog,
    all_or_log,
    read_log,
)

CLASSES = ('cat', 'dog')


DATASET = SimpleNamespace(metainfo={'classes': CLASSES})
LOOP = SimpleNamespace(dataloader=SimpleNamespace(dataset=DATASET))


def classified(name: str, cat: float, truth: int = 0) -> BaseDataElement:
    sample = BaseDataElement(metainfo=dict(img_path=f'/data/{name}.jpg', img_shape=(8, 8)))
    sample.pred_score = torch.tensor([cat, 1 - cat])
    sample.gt_label = torch.tensor([truth])
    return sample


def detected(name: str, boxes: list[list[float]]) -> BaseDataElement:
    shapes = dict(img_shape=(20, 40), ori_shape=(40, 80))
    sample = BaseDataElement(metainfo=dict(img_path=f'/data/{name}.jpg', **shapes))
    values = torch.tensor(boxes).reshape(-1, 6)
    sample.pred_instances = InstanceData(
        bboxes=values[:, :4], scores=values[:, 4], labels=values[:, 5].long()
    )
    return sample


def searched(work_dir: Path, before: list[Any], now: list[Any], images: Any) -> dict[str, Any]:
    """The examples' file after both validations."""
    log = PredictionLog()
    log.watch(None, before)
    log.write(work_dir)
    search = ExampleSearch(work_dir / 'gplq_report.json', LOOP, SimpleNamespace(to_rgb=True))
    search.watch({'inputs': images}, now)
    search.write()
    return json.loads((work_dir / 'gplq_report_examples.json').read_text())


def test_flips_have_both_probabilities(tmp_path: Path) -> None:
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    images[1, 0] = 255  # blue, as files are read
    before = [classified('a', 0.9), classified('b', 0.8), classified('c', 0.6, truth=1)]
    now = [classified('a', 0.7), classified('b', 0.25), classified('c', 0.4, truth=1)]
    found = searched(tmp_path, before, now, images)
    assert (found['compared'], found['different']) == (3, 2)
    first, second = found['examples']
    assert (first['name'], second['name']) == ('b.jpg', 'c.jpg')
    assert first['fp32'] == {'class': 'cat', 'score': 0.8, 'right': True}
    assert first['quantized'] == {'class': 'dog', 'score': 0.75, 'right': False}
    assert second['quantized']['right'] is True
    pixel = Image.open(io.BytesIO(base64.b64decode(first['jpeg']))).getpixel((4, 4))
    assert pixel[2] > 200 > 60 > pixel[0]


def test_boxes_are_shares_of_the_image_without_padding(tmp_path: Path) -> None:
    kept, lost = [0.0, 0.0, 40.0, 40.0, 0.9, 0], [40.0, 20.0, 80.0, 40.0, 0.5, 1]
    unsure = [0.0, 0.0, 80.0, 40.0, 0.2, 0]
    images = [torch.zeros(3, 32, 64, dtype=torch.uint8)]
    found = searched(
        tmp_path, [detected('a', [kept, lost])], [detected('a', [unsure, kept])], images
    )
    example = found['examples'][0]
    assert (example['width'], example['height']) == (40, 20)
    assert [box['state'] for box in example['fp32']] == ['kept', 'lost']
    assert example['fp32'][1]['box'] == [0.5, 0.5, 1.0, 1.0]
    assert example['fp32'][1]['class'] == 'dog'
    assert [box['state'] for box in example['quantized']] == ['kept']


def test_only_the_worst_are_kept(tmp_path: Path) -> None:
    number = MOST_EXAMPLES + 5
    before = [classified(str(i), 0.51) for i in range(number)]
    now = [classified(str(i), 0.49 - i / 100) for i in range(number)]
    found = searched(tmp_path, before, now, torch.zeros(number, 3, 8, 8, dtype=torch.uint8))
    names = [example['name'] for example in found['examples']]
    assert names == [f'{i}.jpg' for i in range(number - 1, 4, -1)]
    assert found['different'] == number


def test_other_images_are_not_compared(tmp_path: Path) -> None:
    log = PredictionLog()
    log.watch(None, [classified('a', 0.9)])
    log.write(tmp_path)
    (tmp_path / 'gplq_report_examples.json').write_text('of an earlier run')
    search = ExampleSearch(tmp_path / 'gplq_report.json', LOOP, None)
    images = {'inputs': torch.zeros(2, 3, 8, 8)}
    search.watch(images, [classified('other', 0.1), classified('more', 0.1)])
    search.write()
    assert search.compared == 0
    assert not (tmp_path / 'gplq_report_examples.json').exists()


def test_predictions_of_other_kinds_are_left_out(tmp_path: Path) -> None:
    log = PredictionLog()
    log.watch(None, [BaseDataElement(metainfo=dict(img_path='a.jpg'))])
    log.write(tmp_path)
    assert read_log(tmp_path) == [None]
    assert read_log(tmp_path / 'nowhere') == []


def test_accuracy_by_class_counts_every_image() -> None:
    accuracy = ClassAccuracy(CLASSES)
    accuracy.watch(None, [classified('a', 0.9), classified('b', 0.2), classified('c', 0.1, 1)])
    assert accuracy.as_dict() == {'cat': 50.0, 'dog': 100.0}


def test_a_watcher_that_fails_is_not_called_again() -> None:
    calls = []

    def fails(batch: Any, samples: Any) -> None:
        calls.append(batch)
        raise RuntimeError('a project of its own kind')

    accuracy = ClassAccuracy(None)
    watch = all_or_log([fails, accuracy.watch])
    watch(0, [classified('a', 0.9)])
    watch(1, [classified('b', 0.2)])
    assert calls == [0]
    assert accuracy.as_dict() == {'class 0': 50.0}
