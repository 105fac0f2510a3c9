# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""mmdet: Swin's window attention, and the roles of the layers in detection heads."""

from typing import Any

from mmdet.models.backbones.swin import ShiftWindowMSA, WindowMSA
from mmdet.models.dense_heads import DETRHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.dense_heads.base_mask_head import BaseMaskHead
from mmdet.models.layers.se_layer import ChannelAttention
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead, MaskIoUHead, MaskPointHead

from .....convert import (
    Context,
    register_attention,
    register_handler,
    register_roles,
    set_predictor_roles,
)
from .....ops.attention.window import WindowAttention

PREDICTORS = r'(^|_)(cls|reg|iou|obj|centerness|logits|score|pred|embed|branches)$'
"""Names of the layers that predict: ``rpn_cls``, ``fc_reg``, ``conv_logits``, ``cls_score``,
``retina_reg``, ``atss_centerness``, ``reg_branches``, ``cls_embed``, ``fc_mask_iou``, ..."""


class QuantWindowMSA(WindowAttention, WindowMSA):
    """``WindowMSA`` with quantized matmuls."""


register_attention({WindowMSA: QuantWindowMSA})


@register_handler(ShiftWindowMSA, ChannelAttention)
def pass_through(module: Any, name: str, context: Context) -> None:
    """Wrappers without own matmul: their children ``w_msa`` and ``fc`` have handlers."""


@register_roles(
    BaseDenseHead, BaseMaskHead, BBoxHead, DETRHead, FCNMaskHead, MaskIoUHead, MaskPointHead
)
def give_predictor_roles(module: Any, name: str, context: Context) -> None:
    """Set ``predictor`` for the layers that predict classes, boxes and masks."""
    set_predictor_roles(module, name, context, PREDICTORS)
