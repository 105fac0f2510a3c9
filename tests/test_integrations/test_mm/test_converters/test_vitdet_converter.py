# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A small ViTDet with mmdet's names, written from its paper, becomes ViTSAM: same numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gplq_mm.integrations.mm.converters.vitdet_checkpoint import (
    convert_vitdet_state_dict,
    rename_key,
    resize_position_embedding,
    resize_relative_positions,
)
from gplq_mm.registry import MODELS

PATCH, DIMS, HEADS, HIDDEN, WINDOW, GRID, PRETRAIN_GRID = 4, 16, 2, 24, 3, 8, 5
GLOBAL_BLOCKS = (1,)
DEPTH = 3


class Block(nn.Module):
    """ViTDet block with the names of mmdet's `projects/ViTDet`, one window at a time."""

    def __init__(self, window: int, size: int) -> None:
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = (nn.LayerNorm(DIMS, eps=1e-5) for _ in range(2))
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(DIMS, 3 * DIMS), nn.Linear(DIMS, DIMS)
        self.attn.rel_pos_h, self.attn.rel_pos_w = (
            nn.Parameter(torch.randn(2 * size - 1, DIMS // HEADS)) for _ in range(2)
        )
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(DIMS, HIDDEN), nn.Linear(HIDDEN, DIMS)

    def attend(self, x: Tensor) -> Tensor:
        """Attention over one window `(H, W, C)`, head by head, position pair by position pair."""
        height, width, _ = x.shape
        rows, cols = (
            g.flatten()
            for g in torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
        )
        row_distance = rows[:, None] - rows[None] + height - 1  # (N, N)
        col_distance = cols[:, None] - cols[None] + width - 1
        q, k, v = self.attn.qkv(x).flatten(0, 1).chunk(3, dim=-1)  # each (N, C)
        outs = []
        for q_h, k_h, v_h in zip(*(t.split(DIMS // HEADS, dim=-1) for t in (q, k, v)), strict=True):
            logits = q_h @ k_h.t() / (DIMS // HEADS) ** 0.5
            bias = (
                self.attn.rel_pos_h[row_distance] + self.attn.rel_pos_w[col_distance]
            )  # (N, N, c)
            outs.append((logits + (q_h[:, None] * bias).sum(-1)).softmax(-1) @ v_h)
        return self.attn.proj(torch.cat(outs, dim=-1)).unflatten(0, (height, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(H, W, C)` to `(H, W, C)`; windows at the border are filled with zeros."""
        normed, (height, width, _) = self.norm1(x), x.shape
        step = self.window or height
        normed = F.pad(normed, (0, 0, 0, -width % step, 0, -height % step))
        rows = [
            torch.cat([self.attend(cell) for cell in band.split(step, dim=1)], dim=1)
            for band in normed.split(step, dim=0)
        ]
        x = x + torch.cat(rows)[:height, :width]
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class SourceViT(nn.Module):
    """The backbone: patches, interpolated position embedding without its class token, blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, DIMS, PATCH, PATCH)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + PRETRAIN_GRID**2, DIMS))
        sizes = [GRID if i in GLOBAL_BLOCKS else WINDOW for i in range(DEPTH)]
        self.blocks = nn.ModuleList(Block(0 if s == GRID else s, s) for s in sizes)

    def forward(self, image: Tensor) -> Tensor:
        """Map `(1, 3, H, W)` to `(1, C, H / 4, W / 4)`."""
        x = self.patch_embed.proj(image)
        grid = (
            self.pos_embed[:, 1:].reshape(1, PRETRAIN_GRID, PRETRAIN_GRID, DIMS).permute(0, 3, 1, 2)
        )
        x = x + F.interpolate(grid, size=x.shape[2:], mode='bicubic', align_corners=False)
        x = x[0].permute(1, 2, 0)
        for block in self.blocks:
            x = block(x)
        return x.permute(2, 0, 1)[None]


def target_backbone(grid: int = GRID) -> nn.Module:
    pytest.importorskip('mmpretrain')
    arch = dict(
        embed_dims=DIMS, num_layers=DEPTH, num_heads=HEADS, feedforward_channels=HIDDEN,
        global_attn_indexes=list(GLOBAL_BLOCKS),
    )  # fmt: skip
    cfg = dict(
        type='mmpretrain.ViTSAM', arch=arch, img_size=grid * PATCH, patch_size=PATCH,
        out_channels=0, window_size=WINDOW, norm_cfg=dict(type='LN', eps=1e-5),
    )  # fmt: skip
    backbone = MODELS.build(cfg)
    backbone.eval()
    return backbone


def with_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A detector's state dict: the backbone, and a neck and head that pass unchanged."""
    others = {'neck.fpn1.1.weight': torch.ones(4), 'roi_head.bbox_head.fc_cls.bias': torch.zeros(3)}
    return {**{f'backbone.{key}': value for key, value in state.items()}, **others}


@pytest.fixture
def source() -> SourceViT:
    torch.manual_seed(0)
    return SourceViT().eval()


def test_converted_backbone_computes_the_same(source):
    target = target_backbone()
    weights = convert_vitdet_state_dict(
        with_prefix(source.state_dict()), with_prefix(target.state_dict())
    )
    target.load_state_dict(
        {k.removeprefix('backbone.'): v for k, v in weights.items() if k.startswith('backbone.')}
    )
    image = torch.randn(1, 3, GRID * PATCH, GRID * PATCH)
    with torch.no_grad():
        torch.testing.assert_close(target(image)[0], source(image), rtol=1e-4, atol=1e-4)


def test_result_has_the_targets_names_shapes_and_order(source):
    target = with_prefix(target_backbone().state_dict())
    weights = convert_vitdet_state_dict(with_prefix(source.state_dict()), target)
    assert list(weights) == list(target)
    assert all(weights[key].shape == target[key].shape for key in target)
    assert torch.equal(weights['neck.fpn1.1.weight'], torch.ones(4))
    assert torch.equal(
        weights['backbone.layers.2.ffn.layers.1.weight'], source.blocks[2].mlp.fc2.weight
    )


def test_position_tables_follow_another_resolution(source):
    weights = convert_vitdet_state_dict(
        with_prefix(source.state_dict()), with_prefix(target_backbone(grid=6).state_dict())
    )
    assert weights['backbone.pos_embed'].shape == (1, 6, 6, DIMS)
    assert weights['backbone.layers.1.attn.rel_pos_h'].shape == (11, DIMS // HEADS)
    assert torch.equal(weights['backbone.layers.0.attn.rel_pos_h'], source.blocks[0].attn.rel_pos_h)


def test_every_misfit_is_named(source):
    state = with_prefix(source.state_dict())
    del state['backbone.blocks.0.norm1.bias']
    state['backbone.blocks.7.norm1.bias'] = torch.zeros(DIMS)
    state['neck.fpn1.1.weight'] = torch.ones(5)
    with pytest.raises(ValueError) as caught:
        convert_vitdet_state_dict(state, with_prefix(target_backbone().state_dict()))
    message = str(caught.value)
    assert '1 unexpected, the target has no such key: backbone.layers.7.ln1.bias' in message
    assert '1 missing in the checkpoint: backbone.layers.0.ln1.bias' in message
    assert '1 of another shape: neck.fpn1.1.weight (5,), target (4,)' in message


def test_a_shallower_target_is_refused_with_few_names(source):
    target = {
        k: v
        for k, v in with_prefix(target_backbone().state_dict()).items()
        if '.layers.2.' not in k
    }
    with pytest.raises(ValueError, match=r'14 unexpected.* and 2 more'):
        convert_vitdet_state_dict(with_prefix(source.state_dict()), target)


@pytest.mark.parametrize(
    ('key', 'renamed'),
    [
        ('backbone.patch_embed.proj.weight', 'backbone.patch_embed.projection.weight'),
        ('backbone.blocks.11.norm2.bias', 'backbone.layers.11.ln2.bias'),
        ('backbone.blocks.10.attn.proj.weight', 'backbone.layers.10.attn.proj.weight'),
        ('backbone.blocks.1.mlp.fc1.bias', 'backbone.layers.1.ffn.layers.0.0.bias'),
        ('neck.lateral_convs.0.norm_layer.weight', 'neck.lateral_convs.0.norm_layer.weight'),
    ],
)
def test_rename_key(key, renamed):
    assert rename_key(key) == renamed


def test_position_embedding_of_the_wanted_size_is_only_reshaped():
    table = torch.randn(1, 1 + 16, 3)
    assert torch.equal(resize_position_embedding(table, (4, 4)).flatten(1, 2), table[:, 1:])
    assert torch.equal(resize_position_embedding(table[:, 1:], (4, 4)).flatten(1, 2), table[:, 1:])


@pytest.mark.parametrize('shape', [(1, 15, 3), (1, 4, 4, 3)])
def test_position_embedding_of_no_square_is_refused(shape):
    with pytest.raises(ValueError, match='must be'):
        resize_position_embedding(torch.zeros(shape), (4, 4))


def test_constant_relative_positions_stay_constant():
    table = torch.full((27, 2), 3.0)
    torch.testing.assert_close(resize_relative_positions(table, 13), torch.full((13, 2), 3.0))
