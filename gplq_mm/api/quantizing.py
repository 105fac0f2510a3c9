# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""``gplq_mm.quantize``: attach quantizers to a float model."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..convert import CoverageReport
from ..convert.handlers import TURNED_OFF
from ..integrations.loading import load_adapters_of
from ..ops import Engine, set_engine
from ..recipe import Recipe, RecipeLike
from .model_state import LOGGER, QuantizationState
from .preparation import prepare_, settle_for


def quantize(
    model: nn.Module,
    recipe: RecipeLike = 'w4a4',
    strict: bool = False,
    engine: str | Mapping[str, Any] | Engine = 'fused',
) -> CoverageReport:
    """Attach quantizers to a float model, in place. It has to be calibrated before it runs.

    Classes of layers are swapped in place: the model keeps its type and keys, and quantizer
    state is added. Operations that stay float are logged as warnings of the logger ``gplq_mm``.
    Keep a ``copy.deepcopy`` from before this call as the teacher of stage 1.

    Args:
        model: Any torch module; the attention products of timm's, torchvision's, mmpretrain's
            and mmdet's transformers and of ``nn.MultiheadAttention`` are quantized too.
        recipe: Preset such as ``w4a4``, or a dict of changes to one (``README.md``, Recipes).
        strict: Raise if an unknown layer or attention class stays float.
        engine: ``fused`` or ``reference``: how a training step is computed, not its result.

    Returns:
        Quantized operations (``coverage.counts``), and those that stay float, with the reason
        (``coverage.kept_float``).

    Raises:
        ValueError: If the model is already quantized, has nothing to quantize, or the recipe
            does not fit it. After an error from ``strict`` or a rule, build the model
                again.

    Examples:
        >>> import gplq_mm
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        >>> gplq_mm.quantize(model, 'w4a4').counts
        {'linear': 2, 'conv': 0, 'matmul': 0}
    """
    if hasattr(model, 'gplq'):
        raise ValueError(f'{type(model).__name__} is already quantized; give a float model')
    load_adapters_of(model)
    resolved, is_detector = settle_for(model, recipe)
    modes = {module: module.training for module in model.modules()}
    coverage, _ = prepare_(model, resolved, strict)
    for module in model.modules():
        module.training = modes.get(module, model.training)
    chosen = set_engine(model, engine)
    model.gplq = QuantizationState(resolved, coverage, chosen, is_detector)  # type: ignore[assignment]
    _log_coverage(model, coverage, resolved)
    return coverage


def _log_coverage(model: nn.Module, coverage: CoverageReport, recipe: Recipe) -> None:
    counts = ', '.join(f'{number} {kind}' for kind, number in coverage.counts.items())
    LOGGER.info('%s: %s: %s quantized', recipe.name, type(model).__name__, counts)
    for name, reason in coverage.kept_float:
        log = LOGGER.info if reason == TURNED_OFF else LOGGER.warning
        log('%s stays float: %s', name or type(model).__name__, reason)
