# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What the gate's result says."""

import pytest

from gplq_mm.analysis.gate.gate_result import GateResult, remedy
from gplq_mm.analysis.start_error import RoleError, StartFigures


def result(error: float, *roles: RoleError) -> GateResult:
    return GateResult(4, 0.5, StartFigures(error, (error, error), rpn_error=0.1), roles)


@pytest.mark.parametrize(('error', 'passed'), [(0.5, True), (0.6, False), (float('nan'), False)])
def test_the_limit_itself_passes_and_no_number_does_not(error: float, passed: bool) -> None:
    assert result(error).passed is passed


def test_a_detectors_line_names_levels_and_scores() -> None:
    expected = 'feature error 0.6 (limit 0.5), by level 0.6, 0.6, RPN scores 0.1 on 4 training'
    assert result(0.6).line.startswith(expected)


def test_weights_are_named_but_get_no_rule_of_a_role() -> None:
    found = result(0.6, RoleError('weights', 3, 0.1), RoleError('input', 2, 0.2))
    text = remedy(found, 'stop')
    assert "rules=[dict(role='input', num_bits=8)]" in text
    assert "recipe='auto'" in text and "recipe='auto'" not in remedy(found, 'add_bits')
