# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Whether a model is finished: converted, calibrated, its weights quantized by stage 2."""

from torch import nn

from ..convert import quantizers


def check_finished(model: nn.Module) -> None:
    """Refuse a model that cannot be deployed yet.

    Args:
        model: Any model. Quantizers that are switched off count as finished.

    Raises:
        ValueError: If it is float, or a quantizer has no scale; the message names the first one
            and what to run.
    """
    known = quantizers(model)
    if not known:
        raise ValueError(
            f'{type(model).__name__} is a float model, it has no quantizers; give one after '
            'stage 2: of gplq_mm.quantize_weights, or of a config with gplq_final.pth'
        )
    missing = [name for name, q in known.items() if q.enabled and not q.is_calibrated]
    if missing:
        raise ValueError(
            f'{len(missing)} quantizers have no scale, first {missing[0]}: deployment needs a '
            'model after stage 2; give gplq_final.pth, or call gplq_mm.quantize_weights first'
        )
