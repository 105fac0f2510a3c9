# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Make a COCO instance-segmentation data set of real handwritten digits.

The digits are the 1 797 scans of 8 x 8 pixels that scikit-learn ships, so nothing is downloaded.
Each is enlarged, turned a little, coloured and placed on a cluttered, noisy canvas; its mask is the
threshold of the enlarged scan, less what a later digit covers. Training and validation images use
disjoint scans.

Layout::

    OUT/annotations/instances_{train,val}.json    OUT/train/*.jpg    OUT/val/*.jpg
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from sklearn.datasets import load_digits

SPLITS = ('train', 'val')
VAL_SCANS = 0.2  # share of the scans kept for validation


@dataclass(frozen=True)
class DigitsSpec:
    """What is generated. Sizes in pixels, ranges inclusive."""

    num_train: int = 1000
    num_val: int = 100
    seed: int = 0
    canvas: int = 160
    digits: tuple[int, int] = (3, 7)
    digit_size: tuple[int, int] = (24, 60)
    max_turn: float = 12.0  # degrees
    max_overlap: float = 0.15  # of the smaller of two masks
    strokes: tuple[int, int] = (4, 10)
    noise: float = 12.0  # standard deviation, grey levels of 255

    def fingerprint(self) -> str:
        """Return a hash of these settings and of this file, hence of the data."""
        text = json.dumps(asdict(self), sort_keys=True) + Path(__file__).read_text()
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Return all scans, ``(1797, 8, 8)`` float32 with ink 0 to 1, and their digits ``(1797,)``."""
    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target


def split_scans(seed: int) -> dict[str, np.ndarray]:
    """Return the indices of the scans of each split, ``(N,)``; no scan is in both."""
    order = np.random.default_rng(seed).permutation(len(load_scans()[1]))
    num_val = round(len(order) * VAL_SCANS)
    return {'train': order[num_val:], 'val': order[:num_val]}


def enlarge(scan: np.ndarray, size: int, turn: float) -> np.ndarray:
    """Enlarge a scan and crop it to its ink.

    Args:
        scan: ``(8, 8)`` ink, 0 to 1.
        size: Longer side of the enlarged scan before cropping, in pixels.
        turn: Rotation in degrees.

    Returns:
        ``(H, W)`` ink, 0 to 1; at least 0.5 is digit, and the crop is tight around that.
    """
    padded = Image.fromarray(np.pad(scan, 2).astype(np.float32))
    image = padded.resize((size * 12 // 8, size * 12 // 8), Image.Resampling.BICUBIC)
    ink = np.asarray(image.rotate(turn, Image.Resampling.BICUBIC))
    ink = np.clip((ink - 0.25) / 0.3, 0, 1)
    rows, columns = np.nonzero(ink >= 0.5)
    return ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def background(rng: np.random.Generator, spec: DigitsSpec) -> np.ndarray:
    """Return a smooth random background with straight strokes, ``(H, W, 3)``, 0 to 255."""
    coarse = Image.fromarray(rng.integers(40, 216, (4, 4, 3), dtype=np.uint8))
    canvas = np.array(coarse.resize([spec.canvas] * 2, Image.Resampling.BICUBIC), np.float32)
    for _ in range(rng.integers(spec.strokes[0], spec.strokes[1] + 1)):
        length, width = rng.integers(10, 50), rng.integers(2, 7)
        start, angle = rng.uniform(0, spec.canvas, 2), rng.uniform(0, 2 * np.pi)
        points = start + np.linspace(0, length, 2 * length)[:, None] * [
            np.sin(angle),
            np.cos(angle),
        ]
        color = rng.uniform(0, 255, 3)
        for row, column in points.astype(int).clip(0, spec.canvas - 1):
            canvas[row : row + width, column : column + width] = color
    return canvas


def contrasting_color(rng: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """Return a colour ``(3,)`` at least 70 grey levels from the mean of ``under`` ``(N, 3)``."""
    while True:
        color = rng.uniform(0, 255, 3)
        if abs(color.mean() - under.mean()) >= 70:
            return color


def find_place(
    rng: np.random.Generator, mask: np.ndarray, taken: list[np.ndarray], spec: DigitsSpec
) -> tuple[int, int] | None:
    """Return the top left corner at which ``mask`` ``(h, w)`` covers little of the ``taken``."""
    height, width = mask.shape
    for _ in range(30):
        row = int(rng.integers(0, spec.canvas - height + 1))
        column = int(rng.integers(0, spec.canvas - width + 1))
        under = [other[row : row + height, column : column + width] & mask for other in taken]
        limits = [spec.max_overlap * min(mask.sum(), other.sum()) for other in taken]
        if all(part.sum() <= limit for part, limit in zip(under, limits, strict=True)):
            return row, column
    return None


def draw_image(
    rng: np.random.Generator, scans: np.ndarray, spec: DigitsSpec
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draw one canvas.

    Args:
        rng: Source of all randomness.
        scans: ``(N,)`` indices of the scans to choose from.
        spec: Sizes and numbers.

    Returns:
        The image ``(H, W, 3)`` uint8 and, for each digit, its scan's index and visible mask
        ``(H, W)`` bool.
    """
    canvas = background(rng, spec)
    chosen: list[int] = []
    masks: list[np.ndarray] = []
    for index in rng.choice(scans, rng.integers(spec.digits[0], spec.digits[1] + 1), replace=False):
        size = int(rng.integers(spec.digit_size[0], spec.digit_size[1] + 1))
        turn = rng.uniform(-spec.max_turn, spec.max_turn)
        ink = enlarge(load_scans()[0][index], size, turn)
        place = find_place(rng, ink >= 0.5, masks, spec)
        if place is None:
            continue
        window = (
            slice(place[0], place[0] + ink.shape[0]),
            slice(place[1], place[1] + ink.shape[1]),
        )
        color = contrasting_color(rng, canvas[window][ink >= 0.5])
        canvas[window] += ink[..., None] * (color - canvas[window])
        mask = np.zeros(canvas.shape[:2], bool)
        mask[window] = ink >= 0.5
        masks = [other & ~mask for other in masks] + [mask]
        chosen.append(int(index))
    canvas += rng.normal(0, spec.noise, canvas.shape)
    image = canvas.clip(0, 255).astype(np.uint8)
    return image, list(zip(chosen, masks, strict=True))


def annotate(mask: np.ndarray, digit: int) -> dict:
    """Return the COCO fields of one instance; ``mask`` is ``(H, W)`` bool."""
    code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return dict(
        category_id=digit + 1,
        iscrowd=0,
        area=float(coco_mask.area(code)),
        bbox=coco_mask.toBbox(code).tolist(),
        segmentation=dict(size=list(mask.shape), counts=code['counts'].decode()),
    )


def write_split(out: Path, split: str, spec: DigitsSpec) -> int:
    """Write the images of a split and then its annotation file; return the number of digits."""
    scans, labels = split_scans(spec.seed)[split], load_scans()[1]
    images: list[dict] = []
    annotations: list[dict] = []
    (out / split).mkdir(parents=True, exist_ok=True)
    for index in range(spec.num_train if split == 'train' else spec.num_val):
        rng = np.random.default_rng([spec.seed, SPLITS.index(split), index])
        pixels, instances = draw_image(rng, scans, spec)
        name = f'{index:06d}.jpg'
        Image.fromarray(pixels).save(out / split / name, quality=95)
        images.append(dict(id=index + 1, file_name=name, height=spec.canvas, width=spec.canvas))
        for scan, mask in instances:
            ids = dict(id=len(annotations) + 1, image_id=index + 1, scan_id=scan)
            annotations.append({**ids, **annotate(mask, int(labels[scan]))})
    content = dict(
        info=dict(description='Handwritten digits on canvases', fingerprint=spec.fingerprint()),
        licenses=[],
        images=images,
        annotations=annotations,
        categories=[
            dict(id=digit + 1, name=str(digit), supercategory='digit') for digit in range(10)
        ],
    )
    path = annotation_file(out, split)
    path.parent.mkdir(exist_ok=True)
    path.with_suffix('.tmp').write_text(json.dumps(content))
    path.with_suffix('.tmp').replace(path)
    return len(annotations)


def annotation_file(out: Path, split: str) -> Path:
    """Return where the annotations of a split lie."""
    return out / 'annotations' / f'instances_{split}.json'


def is_current(out: Path, split: str, spec: DigitsSpec) -> bool:
    """Return whether a split was written completely, by this code with these settings."""
    path = annotation_file(out, split)
    return (
        path.exists()
        and json.loads(path.read_text())['info'].get('fingerprint') == spec.fingerprint()
    )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Make the COCO data set of handwritten digits')
    parser.add_argument('--out', type=Path, default=Path('data/digits'), help='data root to write')
    parser.add_argument('--num-train', type=int, default=DigitsSpec.num_train, help='images')
    parser.add_argument('--num-val', type=int, default=DigitsSpec.num_val, help='images')
    parser.add_argument('--seed', type=int, default=DigitsSpec.seed)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Write both splits, unless they are there already."""
    args = parse_args(argv)
    spec = DigitsSpec(num_train=args.num_train, num_val=args.num_val, seed=args.seed)
    for split in SPLITS:
        if is_current(args.out, split, spec):
            print(f'{annotation_file(args.out, split)}: up to date')
            continue
        count = write_split(args.out, split, spec)
        print(f'{annotation_file(args.out, split)}: {count} digits')


if __name__ == '__main__':
    main()
