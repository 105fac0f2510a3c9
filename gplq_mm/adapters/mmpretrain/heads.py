# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Which layers of a classification head predict."""

from typing import Any

from mmpretrain.models.heads import ClsHead, MultiLabelClsHead

from ...conversion import Context, child_name, register_roles, set_predictor_roles

PREDICTORS = r'^(fc|head|head_dist|dist_head|conv_cls_head|trans_cls_head)$'
"""``LinearClsHead.fc``, ``VisionTransformerClsHead.layers.head``, DeiT's ``head_dist``, ..."""


@register_roles(ClsHead, MultiLabelClsHead)
def give_predictor_roles(module: Any, name: str, context: Context) -> None:
    """``predictor`` to the layers that give the class scores."""
    set_predictor_roles(module, name, context, PREDICTORS)
    if hasattr(module, 'layers'):
        set_predictor_roles(module.layers, child_name(name, 'layers'), context, PREDICTORS)
