# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Shared by all tests: one thread, fixed seeds, the place of the real data."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile('gplq', deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile('gplq')

DEFAULT_DATA_ROOT = Path(__file__).resolve().parents[2] / 'shared'


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def gplq_data() -> Path:
    """Folder with `data/` and `models/`; the test is skipped where it is absent."""
    root = Path(os.environ.get('GPLQ_DATA_ROOT', DEFAULT_DATA_ROOT))
    if not (root / 'data').is_dir():
        pytest.skip(f'no real data in {root}; set GPLQ_DATA_ROOT to the folder that holds data/')
    return root
