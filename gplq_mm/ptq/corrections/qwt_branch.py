# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""QwT as an algorithm of ``weight.ptq``: float side branches after the rounding."""

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from ..algorithms import register_weight_ptq
from ..task import CORRECTS, PTQTask, WeightPTQ
from .qwt import TARGETS, QwT
from .side_branch import attach_compensation


@register_weight_ptq('qwt')
class QwTBranch(WeightPTQ):
    """Fit a linear side branch for each transformer block (arXiv 2411.13918, equation 6).

    Put it after an algorithm that rounds: ``ptq=['percentile', 'qwt']``. The branches
    multiply floats, so the model is not integer-only; the report counts these operations.

    Args:
        blocks: ``auto`` or shell patterns of block names.
        ridge: See ``NormalEquations.solve``.
        target: ``stage1`` or ``block``, see ``QwT``.
    """

    needs_data: ClassVar[bool] = True
    phase: ClassVar[str] = CORRECTS

    def __init__(
        self, blocks: str | Sequence[str] = 'auto', ridge: float = 1e-4, target: str = TARGETS[0]
    ) -> None:
        self.blocks, self.ridge, self.target = blocks, ridge, target

    def prepare(self, model: nn.Module) -> list[str]:
        """Attach unfitted branches, so that checkpoints load."""
        return attach_compensation(model, self.blocks)

    def apply(self, task: PTQTask) -> None:
        """Fit all branches in model order."""
        assert task.run_pass is not None
        attach_compensation(task.model, self.blocks)
        qwt = QwT(
            task.model,
            task.layers,
            task.float_weights,
            self.ridge,
            self.target,
            task.float_biases,
            task.float_norms,
        )
        task.blocks.update(qwt.fit(task.run_pass, task.progress))
