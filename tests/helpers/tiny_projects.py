# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Projects of strangers, small enough for tests: data, float config, stock tools to run them."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = Path(__file__).parent / 'configs'
DETECTORS = ('mask_rcnn_swin', 'mask_rcnn_vit')
CLASSIFIERS = ('vit_classifier', 'swin_classifier', 'timm_classifier')
CLASSES = ('disc', 'box')


@dataclass(frozen=True)
class TinyProject:
    """A folder with `configs/` and `data/`, as a user of mmdet or mmpretrain has it.

    Attributes:
        root: The folder; configs name their data relative to it, so tools run from here.
        config: The float config.
        library: `mmdet` or `mmpretrain`.
    """

    root: Path
    config: Path
    library: str

    @property
    def float_type(self) -> str:
        return 'MaskRCNN' if self.library == 'mmdet' else 'ImageClassifier'


def make_project(root: Path, name: str) -> TinyProject:
    """Write a project: `name` is one of `DETECTORS` or `CLASSIFIERS`."""
    configs = root / 'configs'
    shutil.copytree(CONFIGS, configs, ignore=shutil.ignore_patterns('__pycache__'))
    library = 'mmdet' if name in DETECTORS else 'mmpretrain'
    if library == 'mmdet':
        make_shapes_coco(root / 'data' / 'shapes')
    else:
        make_shapes_folder(root / 'data' / 'shapes_folder')
    return TinyProject(root, configs / f'{name}.py', library)


def draw_shapes(
    rng: np.random.Generator, size: int, kinds: list[int]
) -> tuple[np.ndarray, list[list[int]]]:
    """Draw shapes side by side on a noisy dark image `(size, size, 3)`.

    Returns:
        The image, and for each shape its polygon `[x0, y0, x1, y1, ...]` in pixels.
    """
    image = rng.integers(0, 60, (size, size, 3)).astype(np.uint8)
    polygons = []
    cell = size // len(kinds)
    for i, kind in enumerate(kinds):
        radius = int(rng.integers(cell // 4, cell // 3 + 1))
        x = i * cell + int(rng.integers(radius, cell - radius))
        y = int(rng.integers(radius, size - radius))
        corners = 16 if kind == 0 else 4
        angles = np.arange(corners) * 2 * np.pi / corners + np.pi / 4
        points = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1)
        points = points.clip(0, size - 1).round().astype(np.int32)
        color = (60, 120, 250) if kind == 0 else (240, 200, 60)
        cv2.fillPoly(image, [points], color)
        polygons.append(points.flatten().tolist())
    return image, polygons


def make_shapes_coco(root: Path, train: int = 36, val: int = 4, size: int = 64) -> None:
    """Write a COCO instance-segmentation set: two shapes an image."""
    (root / 'annotations').mkdir(parents=True)
    for split, count, seed in (('train', train, 0), ('val', val, 1)):
        (root / split).mkdir()
        rng = np.random.default_rng(seed)
        images, annotations = [], []
        for i in range(count):
            kinds = [int(kind) for kind in rng.integers(0, 2, 2)]
            image, polygons = draw_shapes(rng, size, kinds)
            image_id = 100 * seed + i
            name = f'{split}_{i}.png'
            cv2.imwrite(str(root / split / name), image)
            images.append(dict(id=image_id, file_name=name, width=size, height=size))
            for kind, polygon in zip(kinds, polygons, strict=True):
                annotations.append(coco_annotation(len(annotations) + 1, image_id, kind, polygon))
        categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES)]
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / 'annotations' / f'{split}.json').write_text(json.dumps(content))


def coco_annotation(number: int, image_id: int, kind: int, polygon: list[int]) -> dict:
    """One object in COCO's format, its box `[x, y, width, height]` around the polygon."""
    x, y = polygon[::2], polygon[1::2]
    width, height = max(x) - min(x), max(y) - min(y)
    return dict(
        id=number,
        image_id=image_id,
        category_id=kind,
        segmentation=[polygon],
        bbox=[min(x), min(y), width, height],
        area=width * height,
        iscrowd=0,
    )


def make_shapes_folder(root: Path, train: int = 40, val: int = 8, size: int = 32) -> None:
    """Write an image-folder classification set: one shape an image."""
    for split, count, seed in (('train', train, 0), ('val', val, 1)):
        rng = np.random.default_rng(seed)
        for i in range(count):
            folder = root / split / CLASSES[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            image, _ = draw_shapes(rng, size, [i % 2])
            cv2.imwrite(str(folder / f'{i}.png'), image)


def stock_tool(library: str, name: str) -> Path:
    """Path of the `tools/<name>.py` that ships inside the installed library."""
    spec = find_spec(library)
    assert spec is not None, f'{library} is not installed'
    assert spec.origin is not None
    return Path(spec.origin).parent / '.mim' / 'tools' / f'{name}.py'


def our_tool(name: str) -> Path:
    """Path of this repository's `tools/<name>.py`."""
    return REPOSITORY / 'tools' / f'{name}.py'


def run_python(
    *command: object, cwd: Path, timeout: int = 300, gpu: bool = False
) -> subprocess.CompletedProcess:
    """Run a Python script or module on one thread, `gplq_mm` importable, output captured."""
    paths = [str(REPOSITORY), os.environ.get('PYTHONPATH', '')]
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join(filter(None, paths)),
        OMP_NUM_THREADS='1',
    )
    if not gpu:
        environment['CUDA_VISIBLE_DEVICES'] = ''
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_ok(*command: object, cwd: Path, gpu: bool = False) -> str:
    """Run as `run_python` does; return what it printed, fail the test where it failed."""
    done = run_python(*command, cwd=cwd, gpu=gpu)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f'exit code {done.returncode}:\n{output[-6000:]}'
    return output


def train_float(project: TinyProject, epochs: int = 1, work_dir: str = 'float') -> Path:
    """Train the float model with the library's own tool; return its checkpoint."""
    options = [
        '--cfg-options',
        f'train_cfg.max_epochs={epochs}',
        f'train_cfg.val_interval={epochs}',
    ]
    tool = stock_tool(project.library, 'train')
    run_ok(tool, project.config, '--work-dir', work_dir, *options, cwd=project.root)
    return project.root / work_dir / f'epoch_{epochs}.pth'
