# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""One image's prediction as plain data, from the data sample that a model returned."""

from pathlib import Path
from typing import Any

SCORE_THRESHOLD, MOST_BOXES = 0.3, 40
"""Boxes below the score are no detections; more of them per image cannot be looked at."""


def plain_prediction(sample: Any) -> dict[str, Any] | None:
    """A prediction of one image.

    Args:
        sample: Data sample of a classifier with one label, or of a detector.

    Returns:
        ``{'name', 'label', 'score', 'truth'}`` of a classifier, ``truth`` None without a ground
        truth; ``{'name', 'boxes'}`` of a detector, each box
        ``[x0, y0, x1, y1, score, label]`` with coordinates as shares of the image's width and
        height; None of anything else.
    """
    scores = getattr(sample, 'pred_score', None)
    if scores is not None and scores.dim() == 1:
        return {'name': _name(sample), **_class_of(sample, scores)}
    instances = getattr(sample, 'pred_instances', None)
    if instances is not None and 'bboxes' in instances and 'ori_shape' in sample:
        return {'name': _name(sample), 'boxes': _boxes_of(sample, instances)}
    return None


def _class_of(sample: Any, scores: Any) -> dict[str, Any]:
    truth = getattr(sample, 'gt_label', None)
    label = int(scores.argmax())
    return {
        'label': label,
        'score': round(float(scores[label]), 4),
        'truth': int(truth) if truth is not None and truth.numel() == 1 else None,
    }


def _boxes_of(sample: Any, instances: Any) -> list[list[float]]:
    """Boxes above the threshold, the surest first."""
    height, width = sample.ori_shape[:2]
    scores = instances.scores.float().cpu()
    order = scores.argsort(descending=True)[:MOST_BOXES]
    order = order[scores[order] >= SCORE_THRESHOLD]
    boxes = instances.bboxes
    boxes = getattr(boxes, 'tensor', boxes).float().cpu()[order]
    shares = (boxes / boxes.new_tensor([width, height, width, height])).clamp(0, 1)
    labels = instances.labels.cpu()[order].tolist()
    return [
        [*(round(value, 4) for value in share), round(score, 4), label]
        for share, score, label in zip(shares.tolist(), scores[order].tolist(), labels, strict=True)
    ]


def _name(sample: Any) -> str:
    path = getattr(sample, 'img_path', None)
    return Path(path).name if path else f'image {getattr(sample, "sample_idx", "")}'.strip()
