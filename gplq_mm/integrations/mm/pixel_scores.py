# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Logits of every pixel from the decode heads of mmseg's segmentors, found by their attributes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ...distillation.score_head import ScoreHead

PREDICTION = {'PIDHead': 1, 'IterativeDecodeHead': -1}
"""Class of a head that gives several outputs -> index of the one that the model predicts with;
the others give it first (EncHead, DAHead, DDRHead)."""


class SegmentorHead(ScoreHead):
    """Decode head, or cascade of decode heads, each of which classifies every pixel.

    Args:
        heads: They get the features, and from the second on the output of the one before. A head
            that classifies sampled points only (PointRend) is left out.
    """

    name = 'decode_head'

    def __init__(self, heads: Sequence[Any]) -> None:
        self.heads = heads

    @classmethod
    def of(cls, model: Any) -> 'SegmentorHead | None':
        """Heads of a model; None without a head that classifies pixels.

        Depth estimators have none (one channel, one class), nor have heads that classify masks
        (MaskFormer): they have no ``cls_seg``.
        """
        found = getattr(model, cls.name, None)
        if found is None:
            return None
        stages = list(found) if isinstance(found, nn.ModuleList) else [found]
        heads = [head for head in stages if not hasattr(head, 'get_points_train')]
        has_scores = heads and all(hasattr(head, 'cls_seg') for head in heads)
        if not has_scores or heads[-1].out_channels == heads[-1].num_classes == 1:
            return None
        return cls(heads)

    def logits(self, features: Any) -> Tensor:
        """``(B * H * W, classes)``."""
        found = self.heads[0](features)
        for head in self.heads[1:]:
            found = head(features, found)
        return _rows(self.heads[-1], found)

    @contextmanager
    def watched(self, model: Any, keep: Callable[[Any], None]) -> Iterator[None]:
        """As in the base class: the last head hands its logits to ``loss_by_feat``."""
        head = SegmentorHead.of(model).heads[-1]  # type: ignore[union-attr]
        compute = head.loss_by_feat

        def loss_by_feat(seg_logits: Any, *args: Any, **kwargs: Any) -> Any:
            keep(_rows(head, seg_logits))
            return compute(seg_logits, *args, **kwargs)

        with ExitStack() as stack:
            vars(head)['loss_by_feat'] = loss_by_feat
            stack.callback(vars(head).pop, 'loss_by_feat')
            yield

    def penultimate(self, features: Any) -> list[Tensor]:
        """As in the base class; there is none."""
        return []

    @property
    def lacking(self) -> str:
        """As in the base class: no decode head has a pooled feature."""
        return type(self.heads[-1]).__name__

    def is_multi_label(self, task: str) -> bool:
        """Whether the loss takes each logit as a separate probability."""
        head = self.heads[-1]
        several = isinstance(head.loss_decode, nn.ModuleList)
        loss = head.loss_decode[0] if several else head.loss_decode
        return head.out_channels == 1 or bool(getattr(loss, 'use_sigmoid', False))


def _rows(head: Any, logits: Any) -> Tensor:
    """Output of a head, ``(B, classes, H, W)`` or several such, as one row per pixel."""
    if isinstance(logits, tuple | list):
        logits = logits[PREDICTION.get(type(head).__name__, 0)]
    return logits.movedim(1, -1).flatten(0, 2)
