# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""How much two predictions for one image differ, and in what."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MATCH_IOU = 0.5
"""Overlap from which two boxes are the same object, as in COCO's easiest AP."""


def label_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """Sum of both probabilities where the class differs, else 0.

    Args:
        first: ``plain_prediction`` of the FP32 model.
        second: Of the quantized one.

    Examples:
        >>> label_difference(dict(label=1, score=0.75), dict(label=2, score=0.5))
        1.25
    """
    return first['score'] + second['score'] if first['label'] != second['label'] else 0.0


def box_states(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]
) -> tuple[list[str], list[str]]:
    """What became of each box.

    Boxes match one another if they overlap by ``MATCH_IOU``, those of the same class first.

    Args:
        first: Boxes of the FP32 model, ``[x0, y0, x1, y1, score, label]``, the surest first.
        second: Of the quantized one.

    Returns:
        For the boxes of ``first``, ``kept``, ``changed`` (class) or ``lost``; for those of
        ``second``, ``kept``, ``changed`` or ``won``.

    Examples:
        >>> box = [0.0, 0.0, 0.5, 0.5, 0.9, 1]
        >>> far = [0.6, 0.6, 0.9, 0.9, 0.9, 1]
        >>> box_states([box], [[*box[:5], 2], far])
        (['changed'], ['changed', 'won'])
    """
    found = ['lost'] * len(first), ['won'] * len(second)
    if not first or not second:
        return found
    overlap = _iou(torch.tensor(first)[:, :4], torch.tensor(second)[:, :4])
    for state in ('kept', 'changed'):
        for i, box in enumerate(first):
            free = [
                j
                for j, other in enumerate(second)
                if found[1][j] == 'won'
                and overlap[i, j] >= MATCH_IOU
                and (other[5] == box[5]) == (state == 'kept')
            ]
            if found[0][i] == 'lost' and free:
                best = max(free, key=lambda j, row=overlap[i]: float(row[j]))  # type: ignore[misc]
                found[0][i] = found[1][best] = state
    return found


def box_difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """Sum of the scores of all boxes that are lost, won or of another class."""
    states = box_states(first, second)
    pairs = zip([*first, *second], [*states[0], *states[1]], strict=True)
    return sum(box[4] for box, state in pairs if state != 'kept')


def _iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes ``(N, 4)`` and ``(M, 4)``, ``(N, M)``."""
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    inside = (high - low).clamp(min=0).prod(-1)
    sizes = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second)]
    return inside / (sizes[0][:, None] + sizes[1][None] - inside).clamp(min=1e-12)
