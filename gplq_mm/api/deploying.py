# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Inference of a finished model on integers, in place."""

from dataclasses import replace
from typing import Any

from torch import nn

from ..ops import set_engine
from ..ops.engine import EngineUser
from ..ops.linear import QuantizedLayer


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
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    users = [m for m in model.modules() if isinstance(m, EngineUser)]
    if not users:
        raise ValueError(
            f'{type(model).__name__} is a float model; deploy takes one after stage 2, such as '
            'that of gplq_mm.quantize_weights, or one built from a config with gplq_final.pth'
        )
    missing = [name for name, m in layers.items() if not _is_finished(m)]
    if missing:
        raise ValueError(
            f'the weights of {len(missing)} layers are not quantized yet, first {missing[0]}; '
            'run stage 2 before: gplq_mm.quantize_weights(model, loader), or tools/ptq.py'
        )
    engine = replace(users[0].engine, inference=inference)  # type: ignore[arg-type]
    chosen = set_engine(model, engine)
    state: Any = getattr(model, 'gplq', None)
    if state is not None:
        state.engine = chosen
    model.eval()
    return model


def _is_finished(layer: QuantizedLayer) -> bool:
    quantizer = layer.weight_quantizer
    return quantizer.is_active or not quantizer.enabled
