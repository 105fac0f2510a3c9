# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Transformers of timm and torchvision, small enough for a second on one core."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import swin_transformer, vision_transformer

_VIT: dict[str, Any] = dict(
    img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5
)
_SWIN: dict[str, Any] = dict(
    img_size=32,
    patch_size=4,
    embed_dim=8,
    depths=(2, 1),
    num_heads=(2, 4),
    window_size=4,
    num_classes=5,
    drop_path_rate=0.0,
)
_TV_SWIN: dict[str, Any] = dict(
    patch_size=[4, 4],
    embed_dim=8,
    depths=[2, 1],
    num_heads=[2, 4],
    window_size=[4, 4],
    stochastic_depth_prob=0.0,
    num_classes=5,
)

MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    'timm vit': (partial(VisionTransformer, **_VIT), 32, 4),
    'timm vit, norms and gate': (
        partial(VisionTransformer, **_VIT, qk_norm=True, scale_attn_norm=True),
        32,
        4,
    ),
    'timm deit distilled': (partial(VisionTransformerDistilled, **_VIT), 32, 4),
    'timm eva': (partial(Eva, **_VIT, use_rot_pos_emb=True), 32, 4),
    'timm eva02': (
        partial(
            Eva, **_VIT, use_rot_pos_emb=True, qkv_fused=False, swiglu_mlp=True, scale_mlp=True
        ),
        32,
        4,
    ),
    'timm beit': (partial(Beit, **_VIT, use_rel_pos_bias=True), 32, 4),
    'timm beit, shared bias': (partial(Beit, **_VIT, use_shared_rel_pos_bias=True), 32, 4),
    'timm swin': (partial(SwinTransformer, **_SWIN), 32, 6),
    'timm swin v2': (partial(SwinTransformerV2, **_SWIN), 32, 6),
    'torchvision vit': (
        partial(
            vision_transformer.VisionTransformer,
            image_size=32,
            patch_size=8,
            num_layers=2,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=32,
            num_classes=5,
        ),
        32,
        4,
    ),
    'torchvision swin': (partial(swin_transformer.SwinTransformer, **_TV_SWIN), 36, 6),
    'torchvision swin v2': (
        partial(
            swin_transformer.SwinTransformer,
            **_TV_SWIN,
            block=swin_transformer.SwinTransformerBlockV2,
            downsample_layer=swin_transformer.PatchMergingV2,
        ),
        36,
        6,
    ),
}
"""Name -> how to build it, image size, matrix products of its attentions."""


def plain_model(name: str, fused: bool = False) -> nn.Module:
    """The model, no parameter 0; timm's attention fused or written out."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = fused  # type: ignore[assignment]
    return model


def images(name: str, number: int = 2) -> Tensor:
    """`(number, 3, H, W)`."""
    size = MODELS[name][1]
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1))
