# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Randomness that depends on seed and epoch only, so that a resumed run repeats it."""

import random
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.dataset import worker_init_fn
from mmengine.dist import get_rank

from ...compat.torch import stop_workers

RandomState = dict[str, Any]
EPOCH_STRIDE = 1_000_003
"""Distance between the seeds of consecutive epochs; prime, larger than any rank x worker."""


def random_state() -> RandomState:
    """Random state of this process, as tensors and plain values that load safely."""
    numpy_state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = numpy_state
    state: RandomState = {
        'python': random.getstate(),
        'numpy': (name, torch.tensor(keys.astype(np.int64)), position, has_gauss, cached),
        'torch': torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: RandomState) -> None:
    """Restore a state of ``random_state``; a resume on a GPU has moved its tensors to the GPU."""
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state['numpy']
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


def seed_epoch(dataloader: Any, seed: int, epoch: int) -> None:
    """Seed this process and the workers of its next epoch.

    MMEngine seeds a run once. The random numbers of an epoch then depend on everything before
    it, so the same epoch would have other augmentations after a resume.

    Args:
        dataloader: Training dataloader; its workers are restarted.
        seed: The run's seed.
        epoch: Epoch about to start.
    """
    epoch_seed = (seed + EPOCH_STRIDE * (epoch + 1)) % 2**31
    mine = epoch_seed + get_rank()
    random.seed(mine)
    np.random.seed(mine)
    torch.manual_seed(mine)
    workers = getattr(dataloader, 'num_workers', 0)
    if workers:
        dataloader.worker_init_fn = partial(
            worker_init_fn, num_workers=workers, rank=get_rank(), seed=epoch_seed
        )
        stop_workers(dataloader)  # persistent ones keep the old seed
