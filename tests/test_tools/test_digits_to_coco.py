# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('sklearn', reason='scikit-learn ships the digits')
COCO = pytest.importorskip('pycocotools.coco', reason='needs pycocotools').COCO

SCRIPT = Path(__file__).resolve().parents[2] / 'tools/dataset_converters/digits_to_coco.py'
SPEC = importlib.util.spec_from_file_location('digits_to_coco', SCRIPT)
digits = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(digits)

NUMBERS = ['--num-train', '6', '--num-val', '4']


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp('digits')
    digits.main(['--out', str(out), *NUMBERS])
    return out


@pytest.fixture(scope='module')
def sets(root):
    return {
        split: COCO(root / 'annotations' / f'instances_{split}.json') for split in digits.SPLITS
    }


def every_annotation(sets):
    return [(data, note) for data in sets.values() for note in data.dataset['annotations']]


def test_every_image_is_there_and_has_digits(root, sets):
    for split, number in (('train', 6), ('val', 4)):
        images = sets[split].dataset['images']
        assert len(images) == number
        for image in images:
            with Image.open(root / split / image['file_name']) as picture:
                assert picture.size == (image['width'], image['height'])
            assert sets[split].getAnnIds(imgIds=image['id'])


def test_ten_categories_in_numeric_order(sets):
    names = [category['name'] for category in sets['val'].loadCats(sets['val'].getCatIds())]
    assert names == list('0123456789')


def test_category_is_the_label_of_the_scan(sets):
    labels = digits.load_scans()[1]
    for data, note in every_annotation(sets):
        assert data.cats[note['category_id']]['name'] == str(labels[note['scan_id']])


def test_box_and_area_are_those_of_the_mask(sets):
    for data, note in every_annotation(sets):
        mask = data.annToMask(note).astype(bool)
        rows, columns = np.nonzero(mask)
        x, y, width, height = note['bbox']
        assert note['area'] == mask.sum()
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())


def test_masks_of_an_image_are_disjoint(sets):
    for data in sets.values():
        for image in data.getImgIds():
            notes = data.loadAnns(data.getAnnIds(imgIds=image))
            assert np.sum([data.annToMask(note) for note in notes], axis=0).max() == 1


def test_masks_follow_the_drawn_digit(root, sets):
    """Ink stands out from the paper just around it."""
    for note in sets['train'].dataset['annotations']:
        name = sets['train'].imgs[note['image_id']]['file_name']
        grey = np.asarray(Image.open(root / 'train' / name).convert('L'), float)
        mask = sets['train'].annToMask(note).astype(bool)
        x, y, width, height = (int(value) for value in note['bbox'])
        paper = grey[y : y + height, x : x + width][~mask[y : y + height, x : x + width]]
        if len(paper):
            assert abs(grey[mask].mean() - paper.mean()) > 10


def test_train_and_val_share_no_scan(sets):
    used = {s: {note['scan_id'] for note in sets[s].dataset['annotations']} for s in digits.SPLITS}
    split = digits.split_scans(seed=0)
    assert not np.intersect1d(split['train'], split['val']).size
    assert len(split['train']) + len(split['val']) == 1797
    assert used['train'] <= set(split['train']) and used['val'] <= set(split['val'])


def test_same_seed_same_data_and_more_images_keep_the_first(root, tmp_path):
    digits.main(['--out', str(tmp_path), '--num-train', '8', '--num-val', '4'])
    for name in ('train/000000.jpg', 'train/000005.jpg', 'val/000003.jpg'):
        assert (root / name).read_bytes() == (tmp_path / name).read_bytes()


def test_other_seed_gives_other_images(root, tmp_path):
    digits.main(['--out', str(tmp_path), *NUMBERS, '--seed', '1'])
    name = 'train/000000.jpg'
    assert (root / name).read_bytes() != (tmp_path / name).read_bytes()


def test_second_run_writes_nothing_and_changed_settings_write_again(tmp_path, capsys):
    out = ['--out', str(tmp_path)]
    digits.main([*out, *NUMBERS])
    (tmp_path / 'val/000000.jpg').unlink()
    digits.main([*out, *NUMBERS])
    assert capsys.readouterr().out.count('up to date') == 2
    assert not (tmp_path / 'val/000000.jpg').exists()
    digits.main([*out, *NUMBERS, '--seed', '1'])
    assert (tmp_path / 'val/000000.jpg').exists()


def test_interrupted_run_is_not_taken_for_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(digits.json, 'dumps', lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        digits.write_split(tmp_path, 'val', digits.DigitsSpec(num_val=1))
    monkeypatch.undo()
    assert not digits.is_current(tmp_path, 'val', digits.DigitsSpec(num_val=1))
    assert list((tmp_path / 'val').iterdir())


def test_annotations_are_plain_json(root):
    content = json.loads((root / 'annotations/instances_val.json').read_text())
    assert set(content) == {'info', 'licenses', 'images', 'annotations', 'categories'}
    assert len({note['id'] for note in content['annotations']}) == len(content['annotations'])
