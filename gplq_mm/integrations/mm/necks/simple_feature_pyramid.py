# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The neck of ViTDet: a pyramid computed from the last feature map of a plain ViT."""

from collections.abc import Sequence

import torch.nn.functional as F
from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from gplq_mm.registry import MODELS


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Strides 4, 8, 16 and 32 from one map of stride 16, with no top-down path.

    Same outputs and same state-dict keys as ``SimpleFPN`` of mmdet's
    ``projects/ViTDet``, so its checkpoints load.

    Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object
    Detection", arXiv 2203.16527, section 3 and appendix A.2.

    Args:
        backbone_channel: Channels C of the backbone's map, a multiple of 4.
        out_channels: Channels of each output map.
        num_outs: Number of output maps; those beyond the pyramid's levels are
            subsampled from the last one.
        in_channels: Channels of the levels before the lateral convolutions.
            They follow from C, ``[C / 4, C / 2, C, C]``; fewer entries make
            fewer levels.
        conv_cfg: Convolution layer, as in mmcv's ``ConvModule``.
        norm_cfg: Normalization layer. Defaults to ``dict(type='gplq_mm.LN2d')``.
        act_cfg: Activation after each convolution. Defaults to none.
        init_cfg: MMEngine's initialization config.

    Raises:
        ValueError: If ``backbone_channel`` is no multiple of 4, if
            ``in_channels`` does not follow from it, or if ``num_outs`` is less
            than the number of levels.
    """

    def __init__(
        self,
        backbone_channel: int,
        out_channels: int,
        num_outs: int,
        in_channels: Sequence[int] | None = None,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        self.in_channels = _level_channels(backbone_channel, in_channels)
        if num_outs < len(self.in_channels):
            raise ValueError(
                f'num_outs must be at least the number of levels, {len(self.in_channels)}; '
                f'got {num_outs}'
            )
        self.backbone_channel = backbone_channel
        self.out_channels = out_channels
        self.num_outs = num_outs
        norm_cfg = norm_cfg or dict(type='gplq_mm.LN2d')

        half, quarter = backbone_channel // 2, backbone_channel // 4
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(backbone_channel, half, kernel_size=2, stride=2),
            build_norm_layer(norm_cfg, half)[1],
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, kernel_size=2, stride=2),
        )
        self.fpn2 = nn.Sequential(
            nn.ConvTranspose2d(backbone_channel, half, kernel_size=2, stride=2)
        )
        self.fpn3 = nn.Sequential(nn.Identity())
        self.fpn4 = nn.Sequential(nn.MaxPool2d(kernel_size=2, stride=2))

        layers = dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg, act_cfg=act_cfg, inplace=False)
        self.lateral_convs = nn.ModuleList(
            ConvModule(channels, out_channels, 1, **layers) for channels in self.in_channels
        )
        self.fpn_convs = nn.ModuleList(
            ConvModule(out_channels, out_channels, 3, padding=1, **layers) for _ in self.in_channels
        )

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute the pyramid.

        Args:
            inputs: Feature map ``(B, C, H, W)``, or the sequence of one such map
                that a backbone returns.

        Returns:
            ``num_outs`` maps ``(B, out_channels, H_l, W_l)``, with sides 4H, 2H, H,
            H / 2, H / 4, ... of the input's (stride 4, 8, 16, 32, 64, ...).

        Raises:
            ValueError: If ``inputs`` is not exactly one map.
        """
        if not isinstance(inputs, Tensor):
            if len(inputs) != 1:
                raise ValueError(
                    f'SimpleFeaturePyramid takes one feature map, got {len(inputs)}; '
                    f'write `out_indices=-1` in the backbone'
                )
            inputs = inputs[0]
        branches = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        outs = [
            fpn_conv(lateral_conv(branch(inputs)))
            for branch, lateral_conv, fpn_conv in zip(
                branches, self.lateral_convs, self.fpn_convs, strict=False
            )
        ]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], kernel_size=1, stride=2))
        return tuple(outs)


def _level_channels(backbone_channel: int, in_channels: Sequence[int] | None) -> list[int]:
    """Channels of each level, checked against those that the branches produce."""
    if backbone_channel < 4 or backbone_channel % 4:
        raise ValueError(f'backbone_channel must be a multiple of 4, got {backbone_channel}')
    made = [backbone_channel // 4, backbone_channel // 2, backbone_channel, backbone_channel]
    if in_channels is None:
        return made
    if not in_channels or list(in_channels) != made[: len(in_channels)]:
        raise ValueError(
            f'in_channels must be {made} (or the first of these) for '
            f'backbone_channel={backbone_channel}, got {list(in_channels)}; or leave it out'
        )
    return list(in_channels)
