# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Roles of the last layers of classifiers, and losses that stage 1 cannot use as written."""

from typing import Any

from mmpretrain.models.classifiers import TimmClassifier
from mmpretrain.models.heads import (
    ClsHead,
    EfficientFormerClsHead,
    LeViTClsHead,
    MultiLabelClsHead,
)

from .....compat.mmpretrain import loss_of_scores
from .....convert import Context, child_name, register_roles, set_predictor_roles

PREDICTORS = r'^(fc|head|head_dist|dist_head|conv_cls_head|trans_cls_head)$'
"""``LinearClsHead.fc``, ``VisionTransformerClsHead.layers.head``, DeiT's ``head_dist``, ..."""


class MeanLeViTClsHead(LeViTClsHead):
    """``LeViTClsHead`` that returns the mean of its two scores in training too, like DeiT's head.

    mmpretrain refuses to train it.
    """

    training: bool

    def forward(self, feats: Any) -> Any:
        """The mean of both scores, as in evaluation mode."""
        training, self.training = (
            self.training,
            False,
        )  # only this module's flag: its children keep theirs
        try:
            return super().forward(feats)
        finally:
            self.training = training


class MeanEfficientFormerClsHead(EfficientFormerClsHead):
    """``EfficientFormerClsHead`` that can train the mean of its two scores."""

    def loss(self, feats: Any, data_samples: Any, **kwargs: Any) -> Any:
        """The loss of ``ClsHead``."""
        return ClsHead.loss(self, feats, data_samples, **kwargs)


_TRAINABLE = {
    LeViTClsHead: MeanLeViTClsHead,
    EfficientFormerClsHead: MeanEfficientFormerClsHead,
}


class FeatureTimmClassifier(TimmClassifier):
    """``TimmClassifier`` whose loss computes its features by ``extract_feat``, for mimicking."""

    def loss(self, inputs: Any, data_samples: Any, **kwargs: Any) -> Any:
        """The loss of ``TimmClassifier``, in the two steps of timm's own forward pass."""
        scores = self.model.forward_head(self.extract_feat(inputs))
        return loss_of_scores(self, scores, data_samples, **kwargs)


@register_roles(TimmClassifier)
def give_feature_loss(module: Any, name: str, context: Context) -> None:
    """Let the loss call ``extract_feat``; subclasses with a loss of their own keep it."""
    if type(module) is TimmClassifier and hasattr(module.model, 'forward_head'):
        module.__class__ = FeatureTimmClassifier


@register_roles(ClsHead, MultiLabelClsHead)
def give_predictor_roles(module: Any, name: str, context: Context) -> None:
    """Set ``predictor`` for the layers that compute the class scores."""
    module.__class__ = _TRAINABLE.get(type(module), type(module))
    set_predictor_roles(module, name, context, PREDICTORS)
    if hasattr(module, 'layers'):
        set_predictor_roles(module.layers, child_name(name, 'layers'), context, PREDICTORS)
