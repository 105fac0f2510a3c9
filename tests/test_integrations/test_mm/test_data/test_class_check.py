# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Classes of model, data sets and annotations that differ are refused in one line."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.dataset import BaseDataset
from torch import nn

from gplq_mm.integrations.mm.data import class_check
from gplq_mm.integrations.mm.data.class_check import check_classes
from gplq_mm.integrations.mm.launch.errors import ConfigError
from tests.helpers.runners import gplq_config, make_runner
from tests.helpers.tiny_projects import TinyProject

OBJECT = {'instances': [{'bbox_label': 0, 'ignore_flag': 0}]}


class Data(BaseDataset):
    """Infos of images in memory."""

    def __init__(self, classes: tuple[str, ...] | None, infos: list[dict[str, Any]]) -> None:
        self.infos = infos
        super().__init__(metainfo={'classes': classes} if classes else None)

    def load_data_list(self) -> list[dict[str, Any]]:
        return self.infos


def classifier(number: int) -> Any:
    return SimpleNamespace(head=SimpleNamespace(num_classes=number))


def detector(number: int) -> Any:
    heads = nn.ModuleList([nn.Identity(), nn.Identity()])
    for head in heads:
        head.num_classes = number  # type: ignore[assignment]
    return SimpleNamespace(roi_head=SimpleNamespace(bbox_head=heads))


def labels(*given: int) -> list[dict[str, Any]]:
    return [{'gt_label': label} for label in given]


@pytest.mark.parametrize(
    ('model', 'data', 'says'),
    [
        (classifier(3), Data(('a', 'b'), labels(0, 1)), r'has 2 classes \(a, b\), head .* has 3'),
        (classifier(1), Data(('a', 'b'), labels(0, 1)), r'has 2 classes \(a, b\), head .* has 1'),
        (detector(1), Data(('a', 'b'), [OBJECT]), r'2 classes .*, roi_head\.bbox_head .* has 1'),
        (detector(2), Data(('a', 'b'), [{'instances': []}] * 3), 'has 3 images and no object'),
    ],
)
def test_labels_of_other_classes_are_refused(model: Any, data: Data, says: str) -> None:
    with pytest.raises(ConfigError, match=f'train_dataloader: Data .*{says}'):
        check_classes(model, {'train': data})


@pytest.mark.parametrize(
    ('model', 'data'),
    [
        (classifier(2), Data(('a', 'b'), labels(0, 1))),
        (classifier(2), Data(('a', 'b', 'c'), labels(0, 1))),  # no label of the third class
        (classifier(9), Data(None, labels(0, 1))),
        (detector(2), Data(('a', 'b'), [{'instances': []}, OBJECT])),
        (SimpleNamespace(**vars(detector(9)), language_model=None), Data(('a', 'b'), [OBJECT])),
        (SimpleNamespace(), Data(('a', 'b'), [OBJECT])),
        (classifier(2), [0, 1]),
    ],
)
def test_what_agrees_or_tells_no_classes_passes(model: Any, data: Any) -> None:
    assert check_classes(model, {'train': data, 'val': data}) is None  # type: ignore[func-returns-value]


def test_training_and_validation_have_the_same_classes() -> None:
    train, val = Data(('a', 'b'), labels(0, 1)), Data(('a', 'c'), labels(0, 1))
    with pytest.raises(ConfigError, match='has the classes a, b, val_dataloader has a, c; write'):
        check_classes(classifier(2), {'train': train, 'val': val})


def test_a_test_without_objects_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(class_check, 'print_log', lambda text, **_: told.append(text))
    check_classes(detector(2), {'test': Data(('a', 'b'), [{'instances': []}])})
    assert 'test_dataloader: Data has 1 images and no object' in told[0]


def test_names_that_an_annotation_file_does_not_have_are_named(tmp_path: Path) -> None:
    coco = pytest.importorskip('mmdet.datasets').CocoDataset
    path = tmp_path / 'a.json'
    image = dict(id=0, file_name='a.png', width=9, height=9)
    box = dict(id=0, image_id=0, category_id=5, bbox=[1, 1, 5, 5], area=25, iscrowd=0)
    categories = [dict(id=5, name='disc'), dict(id=7, name='box')]
    path.write_text(json.dumps(dict(images=[image], annotations=[box], categories=categories)))
    for names, fits in ((('disc', 'box'), True), (('disc', 'bix'), False), (('a', 'b'), False)):
        options = dict(data_prefix=dict(img=''), metainfo=dict(classes=names), pipeline=[])
        data = coco(ann_file=str(path), **options)
        if fits:
            check_classes(detector(2), {'train': data})
            continue
        unknown = ', '.join(name for name in names if name != 'disc')
        says = f'names the classes {unknown}, which .*a.json does not have: .* are disc, box; write'
        with pytest.raises(ConfigError, match=says):
            check_classes(detector(2), {'train': data})


def test_a_run_is_refused_before_it_calibrates(
    project: TinyProject, fp32: Path, tmp_path: Path
) -> None:
    cfg = gplq_config(project, fp32, tmp_path)
    cfg.train_dataloader.dataset.metainfo = dict(classes=('box', 'ring'))
    with pytest.raises(ConfigError, match='train_dataloader has the classes'):
        make_runner(cfg).train()
    assert not list(tmp_path.glob('gplq_*'))
