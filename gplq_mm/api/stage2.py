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
    """Put the weights on their grid, in place, as the recipe's ``weight.ptq`` says.

    Args:
        model: Of ``gplq_mm.quantize``, calibrated, trained or not.
        loader: Images, see ``gplq_mm.calibrate``; GPTQ, which our presets use, needs them.
        forward_loop: In place of a loader, see ``gplq_mm.calibrate``.

    Returns:
        Error of each layer's weight (``result.summary``), and what compensation found.

    Raises:
        ValueError: If the model is not calibrated or its weights are quantized already, the
            algorithm needs images and gets none, the loader does not do, or a weight is NaN or
            infinite.
    """
    state = require_stage(model, (CALIBRATED, STAGE1))
    settings: Any = state.recipe.calibration  # its auto is settled
    run_pass = None
    if loader is not None or forward_loop is not None:
        number = state.recipe.after_training.num_images
        if number is not None:  # as many as the recipe says, or all
            settings = settings.change(all_if_fewer=True)
        wanted = number or settings.num_images
        run_pass, _ = passes(model, loader, forward_loop, settings, wanted)
    result = run_stage2(model, state.recipe, run_pass, logger=LOGGER, seed=settings.seed)
    state.stage = STAGE2
    return result
