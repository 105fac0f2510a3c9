# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Attention of decode heads over the positions or channels of a map: ANN, DANet, ISA, OCR."""

from functools import partial
from typing import Any

import torch
from mmseg.models.decode_heads import ann_head, da_head, isa_head, ocr_head
from mmseg.models.utils import SelfAttentionBlock
from torch import Tensor, nn

from .....convert import Context, attach_matmuls, child_name, make_matmul, register_handler
from .....ops import quantized_attention, swap_class
from .....ops.attention.products import added, multiplied
from .....ops.float_matmul import FloatMatMul


class QuantSelfAttentionBlock(SelfAttentionBlock):
    """``SelfAttentionBlock`` with quantized matmuls; one head."""

    qk_matmul: Any
    pv_matmul: Any

    def forward(self, query_feats: Tensor, key_feats: Tensor) -> Tensor:
        """``(B, C, H, W)`` and ``(B, C', H', W')`` -> ``(B, C'', H, W)``."""
        query, key = self.query_project(query_feats), self.key_project(key_feats)
        value = self.value_project(key_feats)
        if self.query_downsample is not None:
            query = self.query_downsample(query)
        if self.key_downsample is not None:
            key, value = self.key_downsample(key), self.key_downsample(value)
        q = query.flatten(2).permute(0, 2, 1).contiguous()  # (B, N, C)
        k = key.flatten(2)  # (B, C, M), as the product takes it
        v = value.flatten(2).permute(0, 2, 1).contiguous()  # (B, M, C)
        norm = partial(multiplied, factor=self.channels**-0.5)
        adjust = norm if self.matmul_norm else added
        q, k, v = q.unsqueeze(1), k.transpose(1, 2).unsqueeze(1), v.unsqueeze(1)
        x = quantized_attention(self.qk_matmul, self.pv_matmul, q, k, v, adjust)
        x = x.squeeze(1).permute(0, 2, 1).contiguous()
        x = x.reshape(len(x), -1, *query_feats.shape[2:])
        return x if self.out_project is None else self.out_project(x)


class QuantAnnBlock(ann_head.SelfAttentionBlock, QuantSelfAttentionBlock):
    """ANN's block: what it adds is around the forward of ``SelfAttentionBlock``."""


class QuantIsaBlock(isa_head.SelfAttentionBlock, QuantSelfAttentionBlock):
    """ISA's block, see ``QuantAnnBlock``."""


class QuantObjectAttentionBlock(ocr_head.ObjectAttentionBlock, QuantSelfAttentionBlock):
    """OCR's block, see ``QuantAnnBlock``."""


class QuantPAM(da_head.PAM, QuantSelfAttentionBlock):
    """DANet's attention between positions, see ``QuantAnnBlock``."""


class QuantCAM(da_head.CAM):
    """DANet's attention between channels with quantized matmuls; one head."""

    qk_matmul: Any
    pv_matmul: Any

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> same."""
        # three views, so that their gradients are added in the float class's order
        q, k, v = (x.flatten(2).unsqueeze(1) for _ in range(3))  # each (B, 1, C, H * W)

        def adjust(logits: Tensor) -> Tensor:
            return torch.max(logits, -1, keepdim=True)[0].expand_as(logits) - logits

        out = quantized_attention(self.qk_matmul, self.pv_matmul, q, k, v, adjust)
        return self.gamma(out.view(x.shape)) + x


_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    SelfAttentionBlock: QuantSelfAttentionBlock,
    ann_head.SelfAttentionBlock: QuantAnnBlock,
    isa_head.SelfAttentionBlock: QuantIsaBlock,
    ocr_head.ObjectAttentionBlock: QuantObjectAttentionBlock,
    da_head.PAM: QuantPAM,
    da_head.CAM: QuantCAM,
}


@register_handler(*_BLOCKS)
def convert_block(module: Any, name: str, context: Context) -> None:
    """Quantize both matmuls of a block with one head; its projections are children."""
    swap_class(module, _BLOCKS[type(module)])
    attach_matmuls(module, name, context, heads=1)


class QuantSpatialGatherModule(ocr_head.SpatialGatherModule):
    """OCR's object regions: a softmax over the pixels times their features, quantized."""

    pv_matmul: Any

    def forward(self, feats: Tensor, probs: Tensor) -> Tensor:
        """``(B, C, H, W)`` and class scores ``(B, K, H, W)`` -> ``(B, C, K, 1)``."""
        weights = torch.softmax(self.scale * probs.flatten(2), dim=2)  # (B, K, H * W)
        context = self.pv_matmul(weights, feats.flatten(2).permute(0, 2, 1))
        return context.permute(0, 2, 1).contiguous().unsqueeze(3)


@register_handler(ocr_head.SpatialGatherModule)
def convert_gather(module: Any, name: str, context: Context) -> None:
    """Quantize the product of probabilities and features."""
    swap_class(module, QuantSpatialGatherModule)
    product = make_matmul(child_name(name, 'pv_matmul'), context, ('softmax', 'value'), None)
    module.pv_matmul = FloatMatMul() if product is None else product
