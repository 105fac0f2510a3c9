# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import numpy as np
import pytest
import torch

from gplq_mm.quantizers.log_codes import default_levels, quantize_to_levels, thresholds

pytest.importorskip('onnxscript', reason='needs onnx and onnxscript')

from gplq_mm.integrations.onnx.operand_nodes import power_of_two, splitting_factor


@pytest.mark.parametrize('bits', [2, 3, 4])
def test_splitting_equals_the_search_in_the_table(bits) -> None:
    levels = default_levels('log2', bits)
    factor = splitting_factor(levels.numpy().astype(np.int64))
    assert factor is not None
    at = thresholds(levels)[1:]
    ratio = torch.cat(
        [at, at.nextafter(at + 1), at.nextafter(at - 1), torch.logspace(-9, 5, 9999), at[:1] * 0]
    )
    found = np.minimum(power_of_two(ratio.numpy(), factor), levels[-1].numpy()).astype(np.int32)
    assert (found == quantize_to_levels(ratio, levels).numpy()).all()


def test_other_bases_have_no_factor() -> None:
    assert splitting_factor(default_levels('log_sqrt2', 4).numpy().astype(np.int64)) is None
