# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Distribution of a weight in steps of its grid."""

import pytest
import torch

from gplq_mm.ptq.weight_histogram import BINS, weight_histogram
from tests.helpers.reports import quantized_linear


def test_values_on_the_grid_are_counted_at_the_codes() -> None:
    scale = torch.tensor([[0.25], [2.0]])
    codes = torch.tensor([[-8.0, -1.0, 0.0, 7.0], [1.0, 1.0, 1.0, 1.0]])
    layer = quantized_linear(codes * scale)
    layer.weight_quantizer.set_qparams(scale, torch.zeros_like(scale))
    found = weight_histogram(layer, codes * scale)
    assert (found['qmin'], found['qmax'], found['clipped']) == (-8, 7, 0.0)
    assert (found['low'], found['high']) == (-8.5, 7.5)
    width = (found['high'] - found['low']) / BINS
    counted = {
        round(found['low'] + (i + 0.5) * width): n for i, n in enumerate(found['counts']) if n
    }
    assert counted == {-8: 1, -1: 1, 0: 1, 1: 4, 7: 1}


def test_what_lies_beyond_is_in_the_outermost_bins() -> None:
    scale = torch.ones(1, 1)
    weight = torch.tensor([[0.0, 1000.0, -1000.0, 7.4]])
    layer = quantized_linear(weight)
    layer.weight_quantizer.set_qparams(scale, torch.zeros_like(scale))
    found = weight_histogram(layer, weight)
    assert sum(found['counts']) == 4
    assert found['counts'][0] == found['counts'][-1] == 1
    assert found['clipped'] == pytest.approx(0.5)
