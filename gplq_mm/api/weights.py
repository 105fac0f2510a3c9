# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""``gplq_mm.quantize_weights``: stage 2."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

from ..analysis.start_error import as_float_model
from ..convert import quantized_layers
from ..ptq.algorithms import WEIGHT_PTQ, build_weight_ptq
from ..ptq.stage2 import Stage2Result, run_stage2
from ..recipe import Recipe, ptq_of
from .calibrating import passes
from .distilling import require_teacher
from .inputs import ForwardLoop, collect
from .model_state import CALIBRATED, LOGGER, STAGE1, STAGE2, require_stage


def quantize_weights(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    forward_loop: ForwardLoop | None = None,
    teacher: nn.Module | None = None,
) -> Stage2Result:
    """Quantize the weights, in place, with the recipe's ``weight.ptq``.

    Args:
        model: Model of ``gplq_mm.quantize``, calibrated, trained or not.
        loader: Images, see ``gplq_mm.calibrate``; GPTQ, which the ``wXaY`` presets use, needs them.
        forward_loop: Instead of a loader, see ``gplq_mm.calibrate``.
        teacher: The float model, whose features are the target of ``finetune``; those of the
            stage-1 model without it. ``finetune`` takes up to 1 024 images of the loader.
            Refused with algorithms that do not use it.

    Returns:
        Error of each layer's weight (``result.summary``), and the result of compensation.

    Raises:
        ValueError: If the model is not calibrated or its weights are quantized already, the
            algorithm needs images and gets none, the loader is not usable, a weight is NaN or
            infinite, or the teacher is quantized or has no effect.
    """
    state = require_stage(model, (CALIBRATED, STAGE1))
    settings: Any = state.recipe.calibration  # auto is replaced by numbers
    float_model = None
    if teacher is not None:
        _require_use(model, state.recipe)
        require_teacher(model, teacher)
        float_model = partial(as_float_model, model, teacher.state_dict())
    run_pass = more_images = None
    if loader is not None or forward_loop is not None:
        number = state.recipe.after_training.num_images
        if number is not None:  # the recipe's number, or all
            settings = settings.change(all_if_fewer=True)
        requested = number or settings.num_images
        run_pass, *_ = passes(model, loader, forward_loop, settings, requested)
    if loader is not None:
        more_images = partial(_more_images, model, loader, settings.batch_size)
    result = run_stage2(
        model,
        state.recipe,
        run_pass,
        logger=LOGGER,
        seed=settings.seed,
        float_model=float_model,
        more_images=more_images,
    )
    state.stage = STAGE2
    return result


def _require_use(model: nn.Module, recipe: Recipe) -> None:
    """Refuse a teacher that no algorithm of stage 2 would use."""
    algorithms = build_weight_ptq(ptq_of(recipe))
    names = [algorithm.name for algorithm in algorithms]
    if not any(algorithm.uses_float_model for algorithm in algorithms):
        users = sorted(name for name, cls in WEIGHT_PTQ.items() if cls.uses_float_model)
        raise ValueError(
            f'teacher has no effect: weight.ptq={names} does not use it, only {users} does; leave '
            f'teacher out, or write recipe=dict(weight=dict(ptq={[*names, users[0]]}))'
        )
    if all(la.weight_quantizer.is_calibrated for la in quantized_layers(model).values()):
        raise ValueError(
            'teacher has no effect: every weight was quantized in stage 1 (weight.qat=True) and '
            'is rounded by its scale; leave teacher out'
        )


def _more_images(
    model: nn.Module, loader: Iterable[Any], batch_size: int, number: int
) -> Callable[[], None]:
    """A pass over up to so many images of the loader."""
    return collect(loader, number, batch_size).run_pass(model)
