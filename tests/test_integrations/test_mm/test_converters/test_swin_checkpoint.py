# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch

from gplq_mm.integrations.mm.converters.patch_merging import reorder_neighbours
from gplq_mm.integrations.mm.converters.swin_checkpoint import convert_swin_state_dict, rename_key


def stack_as_swin(x: torch.Tensor) -> torch.Tensor:
    """2 x 2 neighbours of `(H, W, C)` as Swin's code concatenates them: `(H W / 4, 4 C)`."""
    corners = [x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]]
    return torch.cat(corners, dim=-1).flatten(0, 1)


def test_reordered_merging_computes_the_same():
    x, weight = torch.randn(4, 6, 3), torch.randn(5, 12)
    unfolded = torch.nn.Unfold(2, stride=2)(x.permute(2, 0, 1)[None])[0].t()  # (H W / 4, 4 C)
    expected = stack_as_swin(x) @ weight.t()
    torch.testing.assert_close(unfolded @ reorder_neighbours(weight).t(), expected)
    assert torch.equal(unfolded, reorder_neighbours(stack_as_swin(x)))


def test_same_as_mmdets_own_converter():
    swin = pytest.importorskip('mmdet.models.backbones.swin')
    keys = [
        'patch_embed.proj.weight',
        'patch_embed.norm.bias',
        'layers.0.blocks.1.norm1.weight',
        'layers.0.blocks.1.attn.relative_position_bias_table',
        'layers.2.blocks.10.attn.proj.weight',
        'layers.2.blocks.10.mlp.fc1.weight',
        'layers.3.blocks.0.mlp.fc2.bias',
        'layers.1.downsample.norm.weight',
        'norm3.bias',
    ]
    source = {key: torch.randn(8) for key in keys}
    source['layers.1.downsample.reduction.weight'] = torch.randn(4, 8)
    expected = swin.swin_converter(source)
    found = convert_swin_state_dict({f'backbone.{k}': v for k, v in source.items()}, expected)
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_heads_keep_their_names():
    for key in (
        'roi_head.bbox_head.0.shared_convs.3.bn.running_mean',
        'neck.fpn_convs.0.conv.bias',
    ):
        assert rename_key(key) == key
