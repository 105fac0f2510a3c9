# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Which models are detectors or segmentors, and where their heads are: one place decides it.

It goes by the names of attributes, which all OpenMMLab libraries share, and imports none of them:
a project's own detector is recognized as well, and so is any torch module with such attributes.
`integrations/loading.py` imports this file, which registers its functions.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...convert.model_facts import ModelFacts, register_model_facts
from ...distillation.score_head import ScoreHead, register_score_head
from ...ptq.rounding.feature_source import FeatureSource, HeadFeatures, register_feature_source
from ...stream import Unit
from .pixel_scores import SegmentorHead
from .roi_features import RoIFeatures

BOX_HEADS = ('roi_head', 'bbox_head', 'rpn_head')
DENSE_HEADS = (*BOX_HEADS, 'mask_head', 'panoptic_head', 'decode_head')
"""Attributes of mmdet's detectors and mmseg's segmentors; without boxes, SOLO has a ``mask_head``
and MaskFormer a ``panoptic_head``."""


@register_model_facts
def describe(model: nn.Module) -> ModelFacts:
    """Facts of a model, whether it is a detector or not.

    A detector's or segmentor's ``auto`` scope is its backbone. Compensation is not for models with
    boxes, as in arXiv 2506.11784. Inputs of RoI heads are taken at the model's own proposals.
    """
    is_detector = hasattr(model, 'backbone') and any(hasattr(model, h) for h in DENSE_HEADS)
    return ModelFacts(
        is_detector=is_detector,
        scope='backbone' if is_detector else 'all',
        compensates=all(getattr(model, head, None) is None for head in BOX_HEADS),
        unpaired=('roi_head',),
    )


def class_counts(model: Any) -> dict[str, int]:
    """Number of classes of each head that predicts the classes of a data set, by its name.

    Empty for a model that reads the names of classes as text.
    """
    if hasattr(model, 'language_model'):
        return {}
    names = ('head', 'bbox_head', 'mask_head', 'panoptic_head', 'decode_head', 'roi_head.bbox_head')
    counts = {}
    for name in names:
        head: Any = model
        for part in name.split('.'):
            head = getattr(head, part, None)
        for one in head if isinstance(head, nn.ModuleList) else [head]:
            number = getattr(one, 'num_classes', None)
            if isinstance(number, int):
                counts[name] = number
    return counts


class ClassifierHead(ScoreHead):
    """Head of mmpretrain's classifiers; its ``pre_logits`` gives the penultimate feature.

    Args:
        head: The head; with several tasks it has ``task_heads``, which may have such themselves.
    """

    name = 'head'

    def __init__(self, head: Any) -> None:
        self.head = head

    def logits(self, features: Any) -> Any:
        """As in the base class."""
        return self.head(features)

    def penultimate(self, features: Any) -> list[Tensor]:
        """As in the base class."""
        found = [head.pre_logits(features) for head in _tasks_of(self.head)]
        return [
            x for given in found for x in (given if isinstance(given, tuple | list) else [given])
        ]

    @property
    def lacking(self) -> str:
        """As in the base class."""
        lacking = (h for h in _tasks_of(self.head) if not hasattr(h, 'pre_logits'))
        return next((type(head).__name__ for head in lacking), '')

    def is_multi_label(self, task: str) -> bool:
        """As in the base class."""
        head = self.head
        for name in filter(None, task.split('.')):
            head = head.task_heads[name]
        return hasattr(head, 'thr')


class WrappedHead(ScoreHead):
    """Head of the model that mmpretrain's ``TimmClassifier`` holds as ``model``.

    Args:
        model: Has timm's ``forward_head(features, pre_logits)``.
    """

    name = 'model'
    lacking = ''

    def __init__(self, model: Any) -> None:
        self.model = model

    def logits(self, features: Any) -> Any:
        """As in the base class."""
        return self.model.forward_head(features)

    def penultimate(self, features: Any) -> list[Tensor]:
        """As in the base class."""
        return [self.model.forward_head(features, pre_logits=True)]

    def is_multi_label(self, task: str) -> bool:
        """False: ``TimmClassifier`` predicts by a softmax."""
        return False


def _tasks_of(head: Any) -> list[Any]:
    """The heads of all tasks in order; a task may have sub-tasks."""
    tasks = getattr(head, 'task_heads', None)
    return [head] if tasks is None else [h for task in tasks.values() for h in _tasks_of(task)]


@register_score_head
def find_score_head(model: Any) -> ScoreHead | None:
    """The head of a classifier, or the decode heads of a segmentor that classify every pixel."""
    head, inner = (getattr(model, kind.name, None) for kind in (ClassifierHead, WrappedHead))
    if head is not None:
        return ClassifierHead(head)
    return WrappedHead(inner) if hasattr(inner, 'forward_head') else SegmentorHead.of(model)


@register_feature_source
def choose_features(model: Any, units: Sequence[Unit]) -> tuple[FeatureSource, list[Unit]] | None:
    """RoI features where RoI heads are quantized; else what the first head gets and gives.

    A head is a child of the model (of the model in a ``TimmClassifier``) whose name ends with
    ``head``; None where none is quantized. Segmentors call methods of their decode heads, never the
    modules: what counts there is the last layer that classifies pixels.
    """
    outer = f'{WrappedHead.name}.' if isinstance(find_score_head(model), WrappedHead) else ''
    owners = [unit.name.removeprefix(outer).split('.')[0] for unit in units]
    if 'roi_head' in owners and hasattr(model, 'rpn_head'):
        return RoIFeatures(model), list(units)
    if SegmentorHead.name in owners:
        last = max(i for i, owner in enumerate(owners) if owner == SegmentorHead.name)
        return HeadFeatures(units[last].module), list(units[: last + 1])
    for index, owner in enumerate(owners):
        if owner.endswith('head'):
            return HeadFeatures(units[index].module), list(units[: index + 1])
    return None
