# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch

import gplq_mm
from gplq_mm.ops import operations
from gplq_mm.ops.dispatch import choose
from tests.helpers.plain_vit import PlainViT, pixels, plain_vit

X = pixels(32)


@pytest.fixture(scope='module')
def finished() -> PlainViT:
    model = plain_vit()
    gplq_mm.quantize(model, dict(name='w4a4', weight=dict(ptq='minmax')))
    gplq_mm.calibrate(model, X.split(8))
    gplq_mm.quantize_weights(model)
    return model


def test_outputs_are_equal_and_the_way_back_exists(finished: PlainViT) -> None:
    with torch.no_grad():
        expected = finished.eval()(X)
        assert gplq_mm.deploy(finished) is finished
        assert finished.gplq.engine.inference == 'integer'
        assert finished.gplq.engine.type == 'fused'
        assert torch.equal(finished(X), expected)
        layer = next(o for o in operations(finished).values() if o.kind == 'linear')
        chosen = choose(layer, torch.randn(2, layer.weight.shape[1]), None)
        assert chosen is not None and chosen.backend == 'integer'
        gplq_mm.deploy(finished, 'simulated')
        chosen = choose(layer, torch.randn(2, layer.weight.shape[1]), None)
        assert chosen is not None and chosen.backend == 'exact'


def test_only_finished_models() -> None:
    model = plain_vit()
    with pytest.raises(ValueError, match='is a float model'):
        gplq_mm.deploy(model)
    gplq_mm.quantize(model, 'w4a4')
    with pytest.raises(ValueError, match='quantizers have no scale, first'):
        gplq_mm.deploy(model)


def test_unknown_engine(finished: PlainViT) -> None:
    with pytest.raises(ValueError, match=r"engine.inference='int4': write one of"):
        gplq_mm.deploy(finished, 'int4')
