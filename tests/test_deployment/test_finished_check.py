# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Which models are finished."""

import pytest

import gplq_mm
from gplq_mm.convert import quantizers
from gplq_mm.deployment.finished_check import check_finished
from tests.helpers.plain_vit import pixels, plain_vit


def test_a_model_is_finished_after_stage_2_and_not_before() -> None:
    model, x = plain_vit(), pixels(8)
    with pytest.raises(ValueError, match='PlainViT is a float model, it has no quantizers'):
        check_finished(model)
    gplq_mm.quantize(model, dict(base='w4a4_v1', gate=None))
    number = len(quantizers(model))
    with pytest.raises(ValueError, match=f'^{number} quantizers have no scale, first patch_embed'):
        check_finished(model)
    gplq_mm.calibrate(model, [x])
    number = len(quantizers(model, 'weight'))
    with pytest.raises(ValueError, match=f'^{number} .* call gplq_mm.quantize_weights first'):
        check_finished(model)
    gplq_mm.quantize_weights(model, [x])
    check_finished(model)
    first = next(iter(quantizers(model).values()))
    first.reset()
    with pytest.raises(ValueError, match='^1 quantizers have no scale'):
        check_finished(model)
    first.enabled = False
    assert check_finished(model) is None
