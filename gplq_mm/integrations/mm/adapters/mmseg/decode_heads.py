# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Decode heads of mmseg: roles of their layers, Segmenter's masks, products that stay float."""

from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import non_local
from mmseg.models.decode_heads import dnl_head, ema_head, ham_head, knet_head, psa_head
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.decode_heads.segmenter_mask_head import SegmenterMaskTransformerHead
from mmseg.models.segmentors import EncoderDecoder
from mmseg.models.utils.encoding import Encoding
from torch import Tensor

from .....compat.mmseg import input_of_head
from .....convert import (
    Context,
    child_name,
    make_matmul,
    register_handler,
    register_roles,
    set_predictor_roles,
)
from .....ops import swap_class
from .....ops.float_matmul import FloatMatMul

PREDICTORS = r'(^|_)(conv_seg|seg_conv|patch_proj|classes_proj|fc_seg|fc_cls|fc_mask)$'
"""Layers that classify pixels: ``conv_seg``, DANet's ``pam_conv_seg``; of Segmenter those whose
product gives the masks."""


@register_roles(BaseDecodeHead)
def give_predictor_roles(module: Any, name: str, context: Context) -> None:
    """Set ``predictor`` for the layers that give the scores of pixels."""
    set_predictor_roles(module, name, context, PREDICTORS)


@register_roles(EncoderDecoder)
def skip_auxiliary_heads(module: Any, name: str, context: Context) -> None:
    """Keep auxiliary heads float: inference does not run them."""
    if getattr(module, 'auxiliary_head', None) is not None:
        context.skip(child_name(name, 'auxiliary_head'), 'runs in training only')


class QuantSegmenterHead(SegmenterMaskTransformerHead):
    """``SegmenterMaskTransformerHead`` with a quantized product of patches and classes."""

    mask_matmul: Any

    def forward(self, inputs: Any) -> Tensor:
        """Features -> masks ``(B, classes, H, W)``."""
        x = input_of_head(self, inputs)
        B, C, H, W = x.shape
        x = self.dec_proj(x.permute(0, 2, 3, 1).contiguous().view(B, -1, C))
        x = torch.cat((x, self.cls_emb.expand(B, -1, -1)), 1)
        for layer in self.layers:
            x = layer(x)
        x = self.decoder_norm(x)
        patches = F.normalize(self.patch_proj(x[:, : -self.num_classes]), dim=2, p=2)
        classes = F.normalize(self.classes_proj(x[:, -self.num_classes :]), dim=2, p=2)
        masks = self.mask_norm(self.mask_matmul(patches, classes.transpose(1, 2)))
        return masks.permute(0, 2, 1).contiguous().view(B, -1, H, W)


@register_handler(SegmenterMaskTransformerHead)
def convert_segmenter(module: Any, name: str, context: Context) -> None:
    """Quantize the product that gives the masks, as predictors are."""
    swap_class(module, QuantSegmenterHead)
    roles = ('predictor', 'predictor')
    product = make_matmul(child_name(name, 'mask_matmul'), context, roles, None)
    module.mask_matmul = FloatMatMul() if product is None else product


@register_handler(
    non_local.NonLocal1d,
    non_local.NonLocal2d,
    non_local.NonLocal3d,
    dnl_head.DisentangledNonLocal2d,
    ema_head.EMAModule,
    ham_head.NMF2D,
    knet_head.KernelUpdateHead,
    psa_head.PSAHead,
    Encoding,
)
def report_products(module: Any, name: str, context: Context) -> None:
    """Report products that have no handler; the layers around them are quantized."""
    kind = type(module).__qualname__
    context.keep_float(child_name(name, 'products'), f'no handler for the products of {kind}')
