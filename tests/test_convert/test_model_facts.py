# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Facts that an integration gives about its models."""

import pytest
from torch import nn

from gplq_mm.convert import ModelFacts, convert_, facts_of, model_facts, register_model_facts


class Known(nn.Sequential):
    """A model that the registered function knows."""


@pytest.fixture(autouse=True)
def no_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is registered."""
    monkeypatch.setattr(model_facts, '_DESCRIBE', [])


def test_a_model_that_nobody_describes_has_the_defaults() -> None:
    assert facts_of(Known()) == ModelFacts(False, 'all', True, ())


def test_the_first_function_that_knows_the_model_describes_it() -> None:
    first = ModelFacts(scope='backbone')
    register_model_facts(lambda model: first if isinstance(model, Known) else None)
    register_model_facts(lambda _: ModelFacts(is_detector=True))
    assert facts_of(Known()) == first
    assert facts_of(nn.Sequential()).is_detector


def test_the_scope_auto_is_the_one_of_the_facts() -> None:
    register_model_facts(lambda _: ModelFacts(scope='backbone'))
    model = nn.ModuleDict({'backbone': nn.Linear(4, 4), 'extra': nn.Linear(4, 4)})
    assert convert_(model, {}).quantized['linear'] == ['backbone']
