# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Inference of a finished model on integers, in place."""

from dataclasses import replace
from typing import Any

from torch import nn

from ..deployment.finished_check import check_finished
from ..ops import set_engine
from ..ops.engine import EngineUser


def deploy(model: nn.Module, inference: str = 'integer') -> nn.Module:
    """Compute the inference of a finished model on integers; outputs do not change by a bit.

    Linear layers, convolutions and attention products run on 8-bit and 16-bit integers where a
    kernel supports them (``gplq_mm.ops.explain`` says why one does not); LayerNorm, GELU, softmax
    and everything else stay torch's. Nothing is exported: the model is used as before, without
    gradients (``torch.no_grad`` or ``torch.inference_mode``).

    Args:
        model: Model after stage 2, of ``gplq_mm.quantize`` or of an MM config; changed in place
            and set to evaluation.
        inference: ``integer``, or ``simulated`` to go back.

    Returns:
        The model.

    Raises:
        ValueError: If the model is float, or its weights are not quantized yet.
    """
    check_finished(model)
    users = [m for m in model.modules() if isinstance(m, EngineUser)]
    engine = replace(users[0].engine, inference=inference)  # type: ignore[arg-type]
    chosen = set_engine(model, engine)
    state: Any = getattr(model, 'gplq', None)
    if state is not None:
        state.engine = chosen
    model.eval()
    return model
