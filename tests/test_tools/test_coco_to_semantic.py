# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Label maps from COCO instances: overlaps, crowds, polygons and run lengths, and the config."""

import importlib.util
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

pytest.importorskip('pycocotools.coco', reason='needs pycocotools')

from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / 'tools/dataset_converters/coco_to_semantic.py'
SPEC = importlib.util.spec_from_file_location('coco_to_semantic', SCRIPT)
converter = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(converter)
SHARED = Path(os.environ.get('GPLQ_DATA_ROOT', ROOT.parent / 'shared')) / 'data'


def square(left: int, top: int, side: int) -> dict:
    """A polygon that covers `side * side` pixels, as COCO's masks count them."""
    right, bottom = left + side, top + side
    return dict(
        segmentation=[[left, top, right, top, right, bottom, left, bottom]],
        area=side * side,
        iscrowd=0,
    )


def crowd(mask: np.ndarray) -> dict:
    code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    counts = dict(size=list(mask.shape), counts=code['counts'].decode())
    return dict(segmentation=counts, area=int(mask.sum()), iscrowd=1)


def write(root: Path, split: str, notes: list[dict], categories: tuple[int, ...] = (3, 7)) -> str:
    """A data set with an image of 12 x 8 pixels; returns the argument of `--ann`."""
    (root / 'images').mkdir(exist_ok=True)
    Image.new('RGB', (12, 8)).save(root / 'images' / f'{split}.png')
    content = dict(
        images=[dict(id=5, file_name=f'{split}.png', width=12, height=8)],
        annotations=[
            dict(id=i, image_id=5, bbox=[0, 0, 1, 1], **n) for i, n in enumerate(notes, 1)
        ],
        categories=[dict(id=i, name=f'class {i}') for i in categories],
    )
    path = root / f'{split}.json'
    path.write_text(json.dumps(content))
    return f'{split}={path}'


def convert(root: Path, *annotations: str, images: Path | None = None) -> None:
    words = ['--images', str(images or root / 'images'), '--ann', *annotations]
    converter.main([*words, '--out', str(root / 'out')])


def labels(root: Path, split: str) -> np.ndarray:
    return np.array(Image.open(root / 'out/labels' / split / f'{split}.png'))


def test_small_is_on_top_and_crowds_are_ignored(tmp_path: Path) -> None:
    cover = np.zeros((8, 12), bool)
    cover[6:] = True
    notes = [
        dict(category_id=7, **square(1, 1, 2)),
        dict(category_id=3, **square(0, 0, 6)),
        dict(category_id=3, **crowd(cover)),
    ]
    convert(tmp_path, write(tmp_path, 'train', notes), write(tmp_path, 'val', []))
    found = labels(tmp_path, 'train')
    wanted = np.zeros((8, 12), np.uint8)
    wanted[:6, :6], wanted[1:3, 1:3], wanted[6:] = 1, 2, 255
    assert found.dtype == np.uint8 and (found == wanted).all()
    assert (labels(tmp_path, 'val') == 0).all()
    assert (tmp_path / 'out/train.txt').read_text() == 'train\n'
    assert not list((tmp_path / 'out').rglob('*.tmp'))


def test_the_config_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip('mmseg')
    from mmengine.registry import DATASETS, DefaultScope
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    notes = [dict(category_id=7, **square(2, 2, 4))]
    convert(tmp_path, write(tmp_path, 'train', notes), write(tmp_path, 'val', notes))
    cfg = Config.fromfile(tmp_path / 'out/dataset.py')
    assert cfg.metainfo.classes == ('background', 'class 3', 'class 7') and cfg.num_classes == 3
    with DefaultScope.overwrite_default_scope('mmseg'):
        train, val = (
            DATASETS.build(cfg[f'{split}_dataloader'].dataset) for split in ('train', 'val')
        )
    sample = val[0]['data_samples'].gt_sem_seg.data
    assert (sample == 2).sum() == 16 and set(sample.unique().tolist()) == {0, 2}
    assert len(train) == 1 and train[0]['inputs'].shape[-2:] <= cfg.crop_size


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(images=Path('/nowhere')), 'images of .* are not in'),
        (dict(categories=(3,)), 'differ from those'),
        (dict(words=['train']), 'write SPLIT=JSON'),
        (dict(words=['train=/nowhere.json']), 'is no file'),
        (dict(categories=tuple(range(1, 256))), '254 at most'),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, message: str
) -> None:
    given = change.get('categories', (3, 7))
    first = write(tmp_path, 'train', [], given if len(given) > 2 else (3, 7))
    words = change.get('words') or [first, write(tmp_path, 'val', [], given)]
    with pytest.raises(SystemExit) as error:
        convert(tmp_path, *words, images=change.get('images'))
    assert re.search(message, f'{error.value} {capsys.readouterr().err}')


@pytest.mark.skipif(not (SHARED / 'coco_subset').is_dir(), reason='no ../shared/data/coco_subset')
def test_real_annotations_of_coco() -> None:
    coco = COCO(SHARED / 'coco_subset/annotations/instances_val2017.json')
    label_of = converter.labels_of(coco)
    assert len(label_of) == 80 and max(label_of.values()) == 80
    crowds = {n['image_id'] for n in coco.dataset['annotations'] if n['iscrowd']}
    for image in coco.loadImgs(sorted(crowds)[:3]):
        found = converter.label_map(coco, image, label_of)
        assert found.shape == (image['height'], image['width']) and (found == 255).any()
        own = {label_of[n['category_id']] for n in coco.imgToAnns[image['id']]}
        assert set(np.unique(found).tolist()) <= {0, 255, *own}
