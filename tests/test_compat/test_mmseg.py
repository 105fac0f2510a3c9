# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What we use of mmsegmentation's internals exists."""

import pytest
import torch

pytest.importorskip('mmseg.models')
from mmseg.models.decode_heads import FCNHead

from gplq_mm.compat.mmseg import input_of_head


def test_a_head_takes_the_level_that_it_names() -> None:
    loss = {'type': 'mmseg.CrossEntropyLoss'}
    size = {'in_channels': 4, 'channels': 4, 'num_classes': 2, 'in_index': 1, 'num_convs': 1}
    head = FCNHead(**size, loss_decode=loss)
    assert hasattr(head, '_transform_inputs'), 'change gplq_mm/compat/mmseg.py'
    features = [torch.zeros(1, 8, 4, 4), torch.ones(1, 4, 2, 2)]
    assert torch.equal(input_of_head(head, features), features[1])
