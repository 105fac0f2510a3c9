# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""MMEngine's runner and loops have what the types say."""

from __future__ import annotations

from typing import Any

import pytest

from gplq_mm.integrations.mm.runner_types import DataLoop, TrainingRunner


def members(protocol: Any) -> set[str]:
    """Names of a protocol's attributes and methods."""
    return {n for n in {*protocol.__annotations__, *vars(protocol)} if not n.startswith('_')}


def test_the_types_name_what_is_used() -> None:
    assert {'model', 'cfg', 'val_loop', 'save_checkpoint'} < members(TrainingRunner)
    assert members(DataLoop) == {'dataloader', 'evaluator', 'fp16'}


@pytest.mark.parametrize('name', sorted(members(TrainingRunner)))
def test_the_runner_has(finished: Any, name: str) -> None:
    assert hasattr(finished.runner, name)


@pytest.mark.parametrize('name', sorted(members(DataLoop)))
def test_the_loop_has(finished: Any, name: str) -> None:
    assert hasattr(finished.runner.val_loop, name)
