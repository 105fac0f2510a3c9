# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Draw the predictions of several detectors: one row per image, one column per model."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import mmcv
import numpy as np
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import VISUALIZERS
from PIL import Image, ImageDraw, ImageFont

SCALE = 3
"""Enlargement of the image; odd, so that the test pipeline's bilinear resize undoes it exactly."""
BAR, GAP = 36, 6  # pixels


def enlarge(image: np.ndarray) -> np.ndarray:
    """Repeat each pixel ``SCALE`` times: ``(H, W, 3)`` to ``(SCALE * H, SCALE * W, 3)``."""
    return image.repeat(SCALE, axis=0).repeat(SCALE, axis=1)


def predict(
    config: str, checkpoint: str, images: Sequence[np.ndarray], score_thr: float, device: str
) -> list[np.ndarray]:
    """Draw the predictions of one detector.

    Args:
        config: Config file of the detector.
        checkpoint: Its weights.
        images: Each ``(H, W, 3)`` uint8 BGR.
        score_thr: Predictions below this score are left out.
        device: Where to run it.

    Returns:
        One drawing ``(H, W, 3)`` uint8 RGB per image.
    """
    model = init_detector(config, checkpoint, device=device)
    settings = {**model.cfg.visualizer, 'vis_backends': [], 'name': checkpoint}
    visualizer = VISUALIZERS.build(settings)
    visualizer.dataset_meta = model.dataset_meta
    drawings = []
    for image in images:
        sample = inference_detector(model, image)
        np.random.seed(0)  # mmdet draws mask colours at random: the same for every model
        visualizer.add_datasample(
            'demo', mmcv.bgr2rgb(image), sample, draw_gt=False, pred_score_thr=score_thr
        )
        drawings.append(visualizer.get_image())
    return drawings


def side_by_side(columns: dict[str, list[np.ndarray]]) -> np.ndarray:
    """Arrange drawings in a grid with a title above each column.

    Args:
        columns: For each title its drawings, all ``(H, W, 3)`` uint8 RGB, the same number each.

    Returns:
        The grid ``(BAR + rows * (H + GAP), columns * (W + GAP), 3)`` uint8 RGB.
    """
    drawings = list(columns.values())
    height, width = drawings[0][0].shape[:2]
    size = (len(columns) * (width + GAP), BAR + len(drawings[0]) * (height + GAP))
    grid = Image.new('RGB', size, 'white')
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(size=BAR * 2 // 3)
    for column, (title, parts) in enumerate(columns.items()):
        left = column * (width + GAP)
        pen.text((left + width / 2, BAR / 2), title, fill='black', font=font, anchor='mm')
        for row, part in enumerate(parts):
            grid.paste(Image.fromarray(part), (left, BAR + row * (height + GAP)))
    return np.asarray(grid)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('images', nargs='+', type=Path, help='images, all of one size')
    parser.add_argument(
        '--model',
        nargs=3,
        action='append',
        required=True,
        metavar=('TITLE', 'CONFIG', 'CHECKPOINT'),
        help='a column; give it once per model',
    )
    parser.add_argument('--out', type=Path, required=True, help='PNG file to write')
    parser.add_argument('--score-thr', type=float, default=0.5)
    parser.add_argument('--device', default='cpu')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the picture."""
    args = parse_args(argv)
    images = [enlarge(mmcv.imread(path)) for path in args.images]
    columns = {
        title: predict(config, checkpoint, images, args.score_thr, args.device)
        for title, config, checkpoint in args.model
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(side_by_side(columns)).save(args.out)
    print(f'{args.out}: {len(images)} images, {", ".join(columns)}')


if __name__ == '__main__':
    main()
