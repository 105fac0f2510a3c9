# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Scales that stage 1 moved."""

import pytest
import torch

from gplq_mm.analysis.scale_changes import scale_changes


def test_the_largest_relative_change_comes_first() -> None:
    before = {
        'a.input_quantizer.scale': torch.tensor([100.0]),
        'b.input_quantizer.scale': torch.tensor([0.01, 0.01]),
        'still.input_quantizer.scale': torch.tensor([1.0]),
        'reshaped.input_quantizer.scale': torch.tensor([1.0]),
        'a.weight': torch.tensor([1.0]),
    }
    after = {
        'a.input_quantizer.scale': torch.tensor([110.0]),
        'b.input_quantizer.scale': torch.tensor([0.04, 0.01]),
        'still.input_quantizer.scale': torch.tensor([1.0]),
        'reshaped.input_quantizer.scale': torch.tensor([1.0, 2.0]),
        'a.weight': torch.tensor([9.0]),
    }
    found = scale_changes(before, after)
    assert [row['name'] for row in found] == ['b.input_quantizer', 'a.input_quantizer']
    assert found[0]['octaves'] == pytest.approx(2**0.5)  # one of two channels moved two octaves
    assert scale_changes(before, after, count=1) == found[:1]


def test_a_scale_that_vanished_is_left_out() -> None:
    before = {'a_quantizer.scale': torch.tensor([1.0])}
    assert scale_changes(before, {'a_quantizer.scale': torch.tensor([0.0])}) == []
