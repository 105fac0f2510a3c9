# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The builder of ``type='gplq_mm.GPLQ'``: it builds a float model and attaches quantizers."""

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import nn

from ...analysis.added_bits import adds_bits, adopt_bits
from ...api.preparation import prepare_, settle_for
from ...compat.torch import before_load_state_dict
from ...convert import CoverageReport
from ...distillation.mimic_features import has_penultimate
from ...distillation.mimic_settings import resolve_mimic
from ...distillation.mimicking import make_mimicking
from ...distillation.score_head import score_head
from ...ops import Engine, set_engine
from ...recipe import Recipe, RecipeLike, as_recipe, plain
from ...registry import MODELS
from ..loading import load_adapters, load_adapters_of
from .checkpoints import checkpoint_io  # noqa: F401  lets torch load MMEngine's checkpoints safely


@dataclass
class GPLQState:
    """Recipe, coverage and engine of a converted model (its attribute ``gplq``).

    Attributes:
        recipe: The resolved recipe.
        coverage: Which operations are quantized and which stay float.
        float_cfg: Config that builds the float model (the teacher).
        is_detector: Whether the default scope is a backbone inside a detector or segmentor.
        engine: Engine that computes training steps.
    """

    recipe: Recipe
    coverage: CoverageReport
    float_cfg: ConfigDict
    is_detector: bool
    engine: Engine


_NESTED = (
    "GPLQ: with model=..., mmdet's init_detector does not find cfg.model.backbone; call it with "
    'cfg_options={}, or write the flat form: float_type=... instead of _delete_ and model'
)


@MODELS.register_module(name='GPLQ')
def build_gplq(
    model: Mapping[str, Any] | None = None,
    float_type: str | None = None,
    recipe: RecipeLike = 'w4a4',
    strict: bool = False,
    engine: str | Mapping[str, Any] = 'fused',
    **float_cfg: Any,
) -> nn.Module:
    """Build a float model, attach quantizers and return it: same class, same keys.

    Two forms; the first keeps ``cfg.model.backbone`` and similar keys where tools expect them::

        model = dict(type='gplq_mm.GPLQ', float_type='MaskRCNN', recipe='w4a4')
        model = dict(_delete_=True, type='gplq_mm.GPLQ', model=_base_.model, recipe='w4a4')

    Args:
        model: Config of the float model (second form).
        float_type: Registered type of the float model (first form); its other arguments are
            given next to it.
        recipe: Preset name or recipe.
        strict: Raise if an unknown layer in the scope stays float.
        engine: ``'fused'`` or ``'reference'``, or a dict with ``type`` and options, see
            ``gplq_mm.ops.Engine``. It changes how a training step is computed, not its result.
        **float_cfg: Arguments of the float model (first form).

    Returns:
        The converted model; ``model.gplq`` holds its recipe and coverage.

    Raises:
        ValueError: If neither or both forms are used, the float model's type is unknown, or
            the recipe does not fit.
    """
    resolved = as_recipe(recipe)
    cfg = ConfigDict(_float_config(model, float_type, float_cfg))
    _require_one_head(cfg)
    load_adapters()
    _require_known_type(cfg)
    network = MODELS.build(copy.deepcopy(cfg))
    load_adapters_of(network)  # mmpretrain's TimmClassifier holds a model of timm
    resolved, is_detector = settle_for(network, resolved)
    has_logits = score_head(network) is not None if is_detector else None
    mimic = resolve_mimic(resolved.mimic, is_detector, has_penultimate(network), has_logits)
    coverage, frozen = prepare_(network, resolved, strict)
    if frozen:
        print_log(
            f'GPLQ: {len(frozen)} scales belong to frozen stages and keep their calibrated values, '
            f'first {frozen[0]}',
            logger='current',
        )
    chosen = set_engine(network, engine)
    if mimic is not None and isinstance(network, BaseModel):
        make_mimicking(network, mimic)
    state = GPLQState(resolved, coverage, cfg, is_detector, chosen)
    network.gplq = state
    if adds_bits(resolved):
        before_load_state_dict(network, adopt_bits)
    _log_coverage(network, coverage, resolved)
    if model is not None and is_detector:
        print_log(_NESTED, logger='current')
    print_log(f'GPLQ: {chosen.description}', logger='current')
    return network


def _float_config(
    model: Mapping[str, Any] | None, float_type: str | None, float_cfg: Mapping[str, Any]
) -> dict[str, Any]:
    if (model is None) == (float_type is None):
        raise ValueError(
            "gplq_mm.GPLQ needs the float model, in one of two forms: float_type='MaskRCNN' with "
            "the model's own arguments, or model=_base_.model"
        )
    if model is not None:
        # MMEngine's runner passes a config's top-level data_preprocessor to the model
        runner_given = {k: v for k, v in float_cfg.items() if k == 'data_preprocessor'}
        unknown = sorted(set(float_cfg) - set(runner_given))
        if unknown:
            raise ValueError(
                f'gplq_mm.GPLQ(model=...) does not take {unknown}; write _delete_=True, '
                'or put them into the float model'
            )
        return _without_pretrained({**runner_given, **model})
    return _without_pretrained({'type': float_type, **float_cfg})


def _require_known_type(cfg: Mapping[str, Any]) -> None:
    kind = cfg.get('type')
    if kind is None:
        raise ValueError("gplq_mm.GPLQ(model=...): the float model has no 'type'")
    if not isinstance(kind, str):
        return
    with MODELS.switch_scope_and_registry(None) as registry:
        if registry.get(kind) is not None:
            return
    scope, _, name = kind.rpartition('.')
    with MODELS.switch_scope_and_registry(scope or None) as registry:
        close = difflib.get_close_matches(name, list(registry.module_dict), n=3)
    hint = f'did you mean {" or ".join(map(repr, close))}? ' if close else ''
    raise ValueError(
        f'gplq_mm.GPLQ: {kind!r} names no model of scope {registry.scope!r}; {hint}Write the type '
        "of the float project's model as its own config has it; a class of the project itself "
        'needs custom_imports'
    )


def _require_one_head(cfg: Mapping[str, Any]) -> None:
    if isinstance(cfg.get('head'), list | tuple):
        raise ValueError(
            f'{cfg.get("type")} has {len(cfg["head"])} heads in a list; mmpretrain has one head: '
            "write head=dict(type='MultiTaskHead', task_heads=dict(NAME=dict(type=...), ...))"
        )


def _without_pretrained(cfg: Any) -> Any:
    """Copy of a config that downloads no backbone weights: the FP32 checkpoint has them."""
    if isinstance(cfg, Mapping):
        kept = {}
        for key, value in cfg.items():
            if key == 'init_cfg' and isinstance(value, list | tuple):
                value = [item for item in value if not _is_fetch(item)]
            if not (key == 'init_cfg' and _is_fetch(value)) and key != 'pretrained':
                kept[key] = _without_pretrained(value)
        return kept
    if isinstance(cfg, list | tuple):
        return type(cfg)(_without_pretrained(item) for item in cfg)
    return copy.deepcopy(cfg)


def _is_fetch(init_cfg: Any) -> bool:
    kind = init_cfg.get('type') if isinstance(init_cfg, Mapping) else None
    return getattr(kind, '__name__', kind) in ('Pretrained', 'PretrainedInit')


def _log_coverage(network: nn.Module, coverage: CoverageReport, recipe: Recipe) -> None:
    counts = ', '.join(f'{number} {kind}' for kind, number in coverage.counts.items())
    print_log(
        f'GPLQ {recipe.name}: {type(network).__name__}, scope {plain(recipe.scope)}: '
        f'{counts} quantized',
        logger='current',
    )
    for name, reason in coverage.kept_float:
        print_log(f'GPLQ: {name} stays float: {reason}', logger='current')
