# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
r"""Make a semantic-segmentation data set of mmsegmentation from COCO instance annotations.

Every image gets one label map, a PNG of its size: 0 is background, 1 to K are the categories in the
order of their ids, and 255 is ignored by losses and metrics (crowd regions). Where instances
overlap, the smaller one is on top. Images are not copied.

Layout::

    OUT/labels/SPLIT/NAME.png    OUT/SPLIT.txt (names of the images)    OUT/dataset.py (config)

Example::

    python tools/dataset_converters/coco_to_semantic.py --images data/nuclei/images \
        --ann train=data/nuclei/instances_train.json val=data/nuclei/instances_val.json \
        --out data/nuclei_semantic
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

BACKGROUND, IGNORED = 0, 255
CONFIG = """# Semantic-segmentation data set, from tools/dataset_converters/coco_to_semantic.py.
dataset_type = 'BaseSegDataset'
data_root = {root!r}
metainfo = dict(
    classes={classes!r},
    palette={palette!r},
)
num_classes = {number}
crop_size = ({crop}, {crop})
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale={scale!r}, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.95),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale={scale!r}, keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
dataset = dict(
    type=dataset_type,
    data_root=data_root,
    metainfo=metainfo,
    img_suffix={suffix!r},
    seg_map_suffix='.png',
    reduce_zero_label=False,
)
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        ann_file='{train}.txt',
        data_prefix=dict(img_path={folder!r}, seg_map_path='labels/{train}'),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        ann_file='{val}.txt',
        data_prefix=dict(img_path={folder!r}, seg_map_path='labels/{val}'),
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
"""


def label_map(coco: COCO, image: dict[str, Any], label_of: dict[int, int]) -> np.ndarray:
    """Semantic label map of one image.

    Args:
        coco: Annotations.
        image: Entry of ``images``.
        label_of: Label of each category id.

    Returns:
        ``(H, W)`` uint8.
    """
    labels = np.full((image['height'], image['width']), BACKGROUND, np.uint8)
    notes = coco.loadAnns(coco.getAnnIds(imgIds=image['id']))
    for note in sorted(notes, key=lambda n: (not n.get('iscrowd', 0), -n['area'])):
        mask = coco.annToMask(note).astype(bool)
        labels[mask] = IGNORED if note.get('iscrowd', 0) else label_of[note['category_id']]
    return labels


def labels_of(coco: COCO) -> dict[int, int]:
    """Label of each category id, from 1 in the order of the ids.

    Raises:
        SystemExit: If the labels do not fit into 8 bits beside background and ignored pixels.
    """
    ids = sorted(coco.getCatIds())
    if len(ids) >= IGNORED:
        raise SystemExit(f'{len(ids)} categories: an 8-bit label map holds {IGNORED - 1} at most')
    return {category: label for label, category in enumerate(ids, BACKGROUND + 1)}


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write(temporary path)`` and rename the result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.tmp')
    write(temporary)
    temporary.replace(path)


def write_split(coco: COCO, images: Path, out: Path, split: str) -> int:
    """Write the label maps of a split and then the list of its images; return their number.

    Raises:
        SystemExit: If an image is missing.
    """
    label_of, entries = labels_of(coco), coco.loadImgs(sorted(coco.getImgIds()))
    absent = [e['file_name'] for e in entries if not (images / e['file_name']).is_file()]
    if absent:
        raise SystemExit(
            f'{len(absent)} of {len(entries)} images of {split!r} are not in {images}, first '
            f'{absent[0]}; give their folder as --images'
        )
    for entry in entries:
        picture = Image.fromarray(label_map(coco, entry, label_of))
        target = out / 'labels' / split / PurePosixPath(entry['file_name']).with_suffix('.png')
        write_atomically(target, lambda path, p=picture: p.save(path, format='PNG'))
    names = [str(PurePosixPath(e['file_name']).with_suffix('')) for e in entries]
    write_atomically(out / f'{split}.txt', lambda path: path.write_text('\n'.join(names) + '\n'))
    return len(entries)


def write_config(sets: dict[str, COCO], images: Path, out: Path, crop: int) -> None:
    """Write the config of the data set: the first split trains, the last validates.

    Raises:
        SystemExit: If the splits have different categories, or the images different suffixes.
    """
    first = next(iter(sets.values()))
    names = [c['name'] for c in first.loadCats(sorted(first.getCatIds()))]
    for split, coco in sets.items():
        if [c['name'] for c in coco.loadCats(sorted(coco.getCatIds()))] != names:
            raise SystemExit(
                f'the categories of {split!r} differ from those of {next(iter(sets))!r}'
            )
    entries = [entry for coco in sets.values() for entry in coco.loadImgs(coco.getImgIds())]
    suffixes = sorted({PurePosixPath(entry['file_name']).suffix for entry in entries})
    if len(suffixes) != 1:
        raise SystemExit(f'images end in {suffixes}: mmsegmentation takes one suffix a data set')
    colors = np.random.default_rng(0).integers(32, 256, (len(names), 3)).tolist()
    text = CONFIG.format(
        root=str(out),
        classes=('background', *names),
        palette=[[0, 0, 0], *colors],
        number=len(names) + 1,
        folder=os.path.relpath(images.resolve(), out.resolve()),
        suffix=suffixes[0],
        crop=crop,
        scale=(4 * crop, crop),
        train=next(iter(sets)),
        val=list(sets)[-1],
    )
    write_atomically(out / 'dataset.py', lambda path: path.write_text(text))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=Path, required=True, help='folder of the images')
    parser.add_argument(
        '--ann', nargs='+', required=True, metavar='SPLIT=JSON', help='COCO annotations'
    )
    parser.add_argument('--out', type=Path, required=True, help='data root to write')
    parser.add_argument(
        '--crop', type=int, default=512, help="side of training crops and images' shorter side"
    )
    args = parser.parse_args(argv)
    if bad := [a for a in args.ann if not all(a.partition('='))]:
        parser.error(f'--ann {bad[0]}: write SPLIT=JSON, such as train=instances_train.json')
    args.ann = dict(a.split('=', 1) for a in args.ann)
    if missing := [a for a in args.ann.values() if not Path(a).is_file()]:
        parser.error(f'--ann: {missing[0]} is no file')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Write label maps, lists and config."""
    args = parse_args(argv)
    sets = {split: COCO(path) for split, path in args.ann.items()}
    for split, coco in sets.items():
        print(f'{split}: {write_split(coco, args.images, args.out, split)} label maps')
    write_config(sets, args.images, args.out, args.crop)
    print(f'{args.out / "dataset.py"}: config of the data set')


if __name__ == '__main__':
    main()
