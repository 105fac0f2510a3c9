# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Layer normalization over the channels of a feature map."""

import torch.nn.functional as F
from torch import Tensor, nn

from gplq_mm.registry import MODELS


@MODELS.register_module(name='LN2d')
class LayerNorm2d(nn.LayerNorm):
    """Normalize each pixel over its channels.

    Configs name it ``norm_cfg=dict(type='gplq_mm.LN2d')``. Inside an mmcv
    ``ConvModule`` the layer is called ``norm_layer``, as in the checkpoints of
    mmdet's ``projects/ViTDet``.

    Args:
        num_channels: Number of channels C.
        eps: Added to the variance. mmcv's ``build_norm_layer`` passes 1e-5 if the config has
            none.

    Raises:
        ValueError: If ``num_channels`` is not positive.

    Example:
        >>> import torch
        >>> x = torch.arange(16.0).reshape(1, 4, 2, 2)
        >>> LayerNorm2d(4)(x).mean(dim=1).abs().max().item() < 1e-6
        True
    """

    _abbr_ = 'norm_layer'

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        if num_channels < 1:
            raise ValueError(f'num_channels must be at least 1, got {num_channels}')
        super().__init__(num_channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize.

        Args:
            x: Feature map ``(B, C, H, W)``.

        Returns:
            Contiguous feature map ``(B, C, H, W)``.
        """
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2).contiguous()
