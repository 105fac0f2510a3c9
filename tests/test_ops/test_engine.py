# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy
import pickle

import pytest
from torch import nn

from gplq_mm.convert import convert_
from gplq_mm.ops import Engine, resolve_engine, set_engine
from gplq_mm.ops.engine import REFERENCE, EngineUser


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
