# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Which layers of a classification head predict."""

from typing import Any

from mmpretrain.models.heads import (
    ClsHead,
    EfficientFormerClsHead,
    LeViTClsHead,
    MultiLabelClsHead,
)

from ...conversion import Context, child_name, register_roles, set_predictor_roles

PREDICTORS = r'^(fc|head|head_dist|dist_head|conv_cls_head|trans_cls_head)$'
"""``LinearClsHead.fc``, ``VisionTransformerClsHead.layers.head``, DeiT's ``head_dist``, ..."""


class _MeanInTraining:
    """A distilled head that in training gives the mean of its two scores, as in inference.

    mmpretrain refuses to train such heads; DeiT's it trains like this.
    """

    training: bool

    def forward(self, feats: Any) -> Any:
        training, self.training = self.training, False  # this flag only: layers inside keep theirs
        try:
            return super().forward(feats)  # type: ignore[misc]
        finally:
            self.training = training


class MeanLeViTClsHead(_MeanInTraining, LeViTClsHead):
    """``LeViTClsHead`` that can be trained."""


class MeanEfficientFormerClsHead(_MeanInTraining, EfficientFormerClsHead):
    """``EfficientFormerClsHead`` that can be trained."""


_TRAINABLE = {
    LeViTClsHead: MeanLeViTClsHead,
    EfficientFormerClsHead: MeanEfficientFormerClsHead,
}


@register_roles(ClsHead, MultiLabelClsHead)
def give_predictor_roles(module: Any, name: str, context: Context) -> None:
    """``predictor`` to the layers that give the class scores."""
    module.__class__ = _TRAINABLE.get(type(module), type(module))
    set_predictor_roles(module, name, context, PREDICTORS)
    if hasattr(module, 'layers'):
        set_predictor_roles(module.layers, child_name(name, 'layers'), context, PREDICTORS)
