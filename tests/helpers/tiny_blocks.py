# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A stack of transformer blocks in plain torch, converted and calibrated."""

import torch
import torch.distributed as dist
from torch import nn

from gplq_mm.calibration.activation_ranges import calibrate_activations
from gplq_mm.convert import convert_, resolve_recipe
from gplq_mm.integrations import loading  # noqa: F401  knows where models have heads
from gplq_mm.ptq.stage2 import run_stage2

WIDTH = 6


class Mixing(nn.Module):
    """Stands for attention: mixes tokens, no matmul of two activations."""

    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        return self.proj(x + x.mean(1, keepdim=True))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.attn = Mixing(width)
        self.ln2 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x, hw_shape=None):
        x = x + self.attn(self.ln1(x))
        return x + self.ffn(self.ln2(x))


class BlockStack(nn.Module):
    """Stem, blocks, head; ``(B, N, 8)`` -> ``(B, N, 3)``."""

    def __init__(self, depth=2, width=WIDTH):
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.layers:
            x = block(x, hw_shape=(1, x.shape[1]))
        return self.head(self.drop(x))


def is_on_grid(layer):
    """Whether the weight's quantizer changes none of its values.

    With an input scale a channel it sees the folded weight: folding rounds once more.
    """
    folded = layer.folded_weight()
    on_grid = layer.weight_quantizer(folded)
    if not layer.folds_input_scale:
        return torch.equal(on_grid, layer.weight)
    return torch.allclose(on_grid, folded, rtol=1e-6, atol=0)


def images(count=8, seed=1):
    return torch.randn(count, 1, 9, 8, generator=torch.Generator().manual_seed(seed))


def run_pass(model, data):
    """The callable that the algorithms take: one call of the model an image."""

    def run():
        with torch.no_grad():
            for image in data:
                model(image)

    return run


def stage1_stack(bits=3, seed=0, data=None, **recipe):
    """A model as it is after stage 1, and a function that runs the calibration images."""
    torch.manual_seed(seed)
    model = BlockStack().eval()
    convert_(model, dict(base=f'w{bits}a{bits}', scope='all', **recipe))
    run = run_pass(model, images() if data is None else data)
    calibrate_activations(model, run)
    return model, run


def stage2_state(data):
    """State after calibration and stage 2 with compensation on ``data``."""
    model, run = stage1_stack(2, data=data)
    recipe = resolve_recipe(dict(base='w2a2', scope='all', stage2=dict(compensation='qwt')))
    run_stage2(model, recipe, run)
    return model.state_dict()


def stage2_on_rank(rank, world, port, folder):
    """One process of a group; saves its state to ``folder/rank.pt``."""
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=world
    )
    torch.save(stage2_state(images(25)[rank::world]), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def ptq_state(ptq, data, folder=None):
    """State after stage 2 with the algorithms ``ptq`` on ``data``."""
    model, run = stage1_stack(2, data=data)
    recipe = resolve_recipe(dict(base='w2a2', scope='all', weight=dict(ptq=ptq)))
    run_stage2(model, recipe, run, folder=folder)
    return model.state_dict()


def ptq_on_rank(rank, ptq, world, port, folder):
    """One process of a group of ``world``; saves its state to ``folder/rank.pt``."""
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=world
    )
    torch.save(ptq_state(ptq, images(9)[rank::world]), f'{folder}/{rank}.pt')
    dist.destroy_process_group()
