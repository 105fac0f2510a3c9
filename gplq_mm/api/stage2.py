# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""``gplq_mm.quantize_weights``: stage 2."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..algorithms.stage2 import Stage2Result, run_stage2
from .calibration import passes
from .inputs import ForwardLoop
from .model_state import CALIBRATED, LOGGER, STAGE1, STAGE2, require_stage


def quantize_weights(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    forward_loop: ForwardLoop | None = None,
) -> Stage2Result:
    """Quantize the weights, in place, with the recipe's ``weight.ptq``.

    Args:
        model: Model of ``gplq_mm.quantize``, calibrated, trained or not.
        loader: Images, see ``gplq_mm.calibrate``; GPTQ, which the ``wXaY`` presets use, needs them.
        forward_loop: Instead of a loader, see ``gplq_mm.calibrate``.

    Returns:
        Error of each layer's weight (``result.summary``), and the result of compensation.

    Raises:
        ValueError: If the model is not calibrated or its weights are quantized already, the
            algorithm needs images and gets none, the loader is not usable, or a weight is NaN or
                infinite.
    """
    state = require_stage(model, (CALIBRATED, STAGE1))
    settings: Any = state.recipe.calibration  # auto is replaced by numbers
    run_pass = None
    if loader is not None or forward_loop is not None:
        number = state.recipe.after_training.num_images
        if number is not None:  # the recipe's number, or all
            settings = settings.change(all_if_fewer=True)
        requested = number or settings.num_images
        run_pass, _ = passes(model, loader, forward_loop, settings, requested)
    result = run_stage2(model, state.recipe, run_pass, logger=LOGGER, seed=settings.seed)
    state.stage = STAGE2
    return result
