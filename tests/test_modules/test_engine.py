# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy
import pickle

import pytest
import torch
from torch import nn

from gplq_mm.conversion import convert_
from gplq_mm.modules import Engine, resolve_engine, set_engine
from gplq_mm.modules.engine import REFERENCE, EngineUser, packs
from gplq_mm.quantizers import FakeQuantizer, QuantSpec


def test_names_and_settings() -> None:
    assert resolve_engine('reference') == REFERENCE
    assert resolve_engine(dict(ffn='recompute')) == Engine('fused', 'recompute')
    assert resolve_engine(REFERENCE) is REFERENCE
    assert pickle.loads(pickle.dumps(Engine())) == Engine()


@pytest.mark.parametrize(
    ('engine', 'message'),
    [
        ('fast', "engine.type='fast': write one of"),
        (dict(ffn='none'), "engine.ffn='none': write one of"),
        (dict(compile=True), "engine has no key 'compile'; the keys are"),
    ],
)
def test_mistakes(engine, message) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_engine(engine)


def test_every_operator_gets_it_and_copies_keep_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Conv2d(2, 2, 1))
    convert_(model, dict(base='w4a4', scope='all'))
    assert model[0].engine is REFERENCE  # lower floors choose nothing
    state = list(model.state_dict())
    assert set_engine(model, 'fused').is_fused
    users = [m for m in copy.deepcopy(model).modules() if isinstance(m, EngineUser)]
    assert len(users) == 2 and all(m.engine.is_fused for m in users)
    assert list(model.state_dict()) == state


def test_description_says_what_is_active() -> None:
    assert REFERENCE.description.startswith('engine reference')
    assert 'packed codes' in Engine().description and 'passes' in Engine().description


def test_packs_only_in_training_with_active_quantizers() -> None:
    quantizer = FakeQuantizer(QuantSpec())
    assert not packs(Engine(), quantizer)
    quantizer.set_qparams(torch.tensor(1.0), torch.tensor(0.0))
    assert packs(Engine(), quantizer) and not packs(REFERENCE, quantizer)
    with torch.no_grad():
        assert not packs(Engine(), quantizer)
    quantizer.enabled = False
    assert not packs(Engine(), quantizer)
