# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Checkpoints of a GPLQ run: what they record, how they are checked and written."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mmengine
from mmengine.dist import barrier, is_main_process
from torch import Tensor, nn

from ....analysis.added_bits import adopt_rules_
from ....analysis.start_error import quantization_keys
from ....convert import quantizers, state_keys
from ....recipe import Recipe, former_base, former_counterpart, recipe_difference
from ....recipe.recorded import recorded_recipe
from ....stream.stored_file import unfinished_file
from ..runner_types import TrainingRunner
from .checkpoint_io import write_checkpoint

KEY = 'gplq'
STAGE1_NAME = 'gplq_stage1.pth'
FINAL_NAME = 'gplq_final.pth'
_TRAINING_ONLY = (
    'optim.',
    'mimic',
    'name',
    'calibration.',
    'gate',
    'weight.ptq',
    'stage2.num_images',
)
"""Recipe keys that determine the weights and scales, not how the model runs."""
CALIBRATED_NAME = 'gplq_calibrated.pth'


def unwrap(model: Any) -> Any:
    """The converted network inside a DDP-like or test-time-augmentation wrapper.

    Raises:
        TypeError: If there is none: the model was not built by ``gplq_mm.GPLQ``.
    """
    while not hasattr(model, 'gplq') and isinstance(getattr(model, 'module', None), nn.Module):
        model = model.module
    if not hasattr(model, 'gplq'):
        raise TypeError(
            f"{type(model).__name__} was not built by type='gplq_mm.GPLQ'; write model = "
            "dict(type='gplq_mm.GPLQ', float_type=..., recipe='w4a4')"
        )
    return model


def short_sha256(value: Any) -> str:
    """Sixteen hexadecimal digits that change with a value's text."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def file_sha256(path: str | Path) -> str | None:
    """SHA-256 of a local file; None for a URL."""
    if not os.path.isfile(path):
        return None
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_quantized_checkpoint(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was written by a GPLQ run."""
    return KEY in checkpoint


def load_float_(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Load FP32 weights into a converted model; only quantizer keys may be missing.

    The model's own quantizer state is added to the checkpoint: MMEngine loads it once more
    and would warn of missing keys.

    Args:
        model: Converted model.
        checkpoint: Loaded FP32 checkpoint; its ``state_dict`` is completed.

    Raises:
        ValueError: If a key is missing, unexpected or of another shape, or a weight is NaN or
            infinite; the message names it.
    """
    state = state_dict_of(checkpoint)
    try:
        result = model.load_state_dict(state, strict=False)
    except Exception as error:  # hooks that resize position embeddings raise anything
        shapes = _other_shapes(model, state)
        _refuse(model, 'other shapes', shapes or [' '.join(str(error).split())])
    added, keys = quantization_keys(model), state_keys(model)
    missing = [k for k in result.missing_keys if keys.get(k, k) not in added]
    if missing:
        _refuse(model, 'missing keys', missing)
    unexpected = [k for k in result.unexpected_keys if not k.endswith('num_batches_tracked')]
    if unexpected:
        _refuse(model, 'keys that the model does not have', unexpected)
    floats = {n: p for n, p in model.named_parameters() if keys[n] not in added}
    broken = [n for n, p in floats.items() if not p.isfinite().all()]
    if broken:
        _refuse(model, 'NaN or infinity in', broken)
    if 'state_dict' in checkpoint:
        own = model.state_dict()
        checkpoint['state_dict'].update({k: own[k].cpu() for k in added})


def check_quantized(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that this converted model cannot run.

    Args:
        model: Converted model, with its ``gplq`` state.
        checkpoint: Loaded checkpoint.

    Raises:
        ValueError: If it was not written by a GPLQ run, is uncalibrated, was made with
            another recipe or for another model, or a weight, scale or statistic is NaN or infinite;
            the message names the difference.
    """
    if not is_quantized_checkpoint(checkpoint):
        raise ValueError(
            'the checkpoint holds no GPLQ state: it is a float checkpoint, whose quantizers were '
            'never calibrated; run tools/train.py with this config first, and test its '
            f'{FINAL_NAME} or {STAGE1_NAME}'
        )
    state_of_model: Any = model.gplq
    made_with = recorded_recipe(checkpoint[KEY]['recipe'])
    state_of_model.recipe = adopt_rules_(model, _recipe(model), made_with)
    _require_same_recipe(checkpoint, _recipe(model).as_dict())
    state = state_dict_of(checkpoint)
    _require_same_keys(model, state)
    keys = state_keys(model)
    uncalibrated = [
        name
        for name in quantizers(model, 'activation')
        if not bool(state.get(keys[f'{name}.calibrated'], False))
    ]
    if uncalibrated:
        raise ValueError(
            f'{len(uncalibrated)} quantizers of the checkpoint were never calibrated, first '
            f'{uncalibrated[0]}; run tools/train.py with this config'
        )
    broken = _broken(model, state)
    if broken:
        remedy = 'give an earlier checkpoint of the run, or run tools/train.py again'
        _refuse(model, 'NaN or infinity in', broken, remedy)


def recipe_differences(checkpoint: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """Dotted recipe keys that keep a model of ``recipe`` from running a checkpoint.

    Args:
        checkpoint: Quantized checkpoint.
        recipe: Full recipe as a plain dict.
    """
    made_with = recorded_recipe(checkpoint[KEY]['recipe'])
    if checkpoint[KEY]['stage'] != 'stage2' and not _differences(
        before_stage2(made_with), before_stage2(recipe)
    ):
        return []
    return _differences(made_with, recipe)


def _require_same_recipe(checkpoint: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    differences = recipe_differences(checkpoint, recipe)
    if not differences:
        return
    former = former_counterpart(recipe, recorded_recipe(checkpoint[KEY]['recipe']))
    if former is not None:
        differences = recipe_differences(checkpoint, former)
    if differences:
        raise ValueError(
            'the checkpoint was made with another recipe; checkpoint != config: '
            + '; '.join(differences)
        )
    base = former_base(recipe)
    raise ValueError(
        f'the checkpoint was made with an earlier version of recipe {recipe["name"]!r}, and a '
        f'training keeps the quantizers it began with; write recipe={base!r}, or '
        f'recipe=dict(base={base!r}, ...) if you override keys'
    )


def _differences(made_with: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    found = recipe_difference(made_with, expected)
    return [d for d in found if not d.startswith(_TRAINING_ONLY)]


def before_stage2(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a recipe that determines a stage-1 model: all but the weights' bits.

    Weights are float in stage 1 (without ``weight.qat``), so one stage-1 checkpoint serves
    recipes that differ in these bits only.

    Args:
        recipe: Resolved recipe.
    """
    sections = [recipe['weight'], *(rule.get('weight') or {} for rule in recipe['rules'])]
    if any(section.get('qat') for section in sections):
        return dict(recipe)
    weight = {k: v for k, v in recipe['weight'].items() if k != 'num_bits'}
    rules = [{k: v for k, v in rule.items() if k != 'weight'} for rule in recipe['rules']]
    for rule, given in zip(rules, recipe['rules'], strict=True):
        kept = {k: v for k, v in (given.get('weight') or {}).items() if k != 'num_bits'}
        rule.update({'weight': kept} if kept else {})
    rules = [rule for rule in rules if set(rule) - {'name', 'role', 'optional'}]
    return {**recipe, 'weight': weight, 'rules': rules}


def record(model: nn.Module, stage: str, source: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint records of its quantization, as plain types.

    Args:
        model: Converted model.
        stage: ``calibrated``, ``stage1`` or ``stage2``.
        source: ``path`` and ``sha256`` of the FP32 checkpoint.
    """
    return {'recipe': _recipe(model).as_dict(), 'stage': stage, 'float_checkpoint': dict(source)}


def save_resumable(runner: TrainingRunner, name: str) -> str:
    """Write the runner's full state atomically, as the checkpoint that ``--resume`` finds.

    Args:
        runner: TrainingRunner in training, before its first iteration.
        name: File name in the work dir.

    Returns:
        Path of the file.
    """
    if is_main_process():
        write_resumable(runner, name, runner.iter)
    barrier()
    return os.path.join(runner.work_dir, name)


def write_resumable(runner: TrainingRunner, name: str, iterations: int) -> str:
    """As ``save_resumable``, from one process, which waits for no other.

    Args:
        runner: Runner in training.
        name: File name in the work dir.
        iterations: Number of finished iterations.

    Returns:
        Path of the file.
    """
    path = os.path.join(runner.work_dir, name)
    meta = {'epoch': runner.epoch, 'iter': iterations}
    with unfinished_file(Path(path)) as unfinished:
        runner.save_checkpoint(runner.work_dir, unfinished.name, meta=meta)
    with unfinished_file(Path(runner.work_dir) / 'last_checkpoint') as unfinished:
        unfinished.write_text(path)
    return path


def snapshot(runner: TrainingRunner, dataset: Any, through_hooks: bool) -> dict[str, Any]:
    """Weights and meta of the runner's model, in the layout of MMEngine's checkpoints.

    Args:
        runner: TrainingRunner runner.
        dataset: Its ``metainfo`` (classes, palette) is stored too.
        through_hooks: Let hooks edit it as they do when the runner saves (the EMA
            hook puts the averaged weights in).
    """
    model = unwrap(runner.model)
    meta: dict[str, Any] = {
        'cfg': runner.cfg.pretty_text,
        'seed': runner.seed,
        'experiment_name': runner.experiment_name,
        'mmengine_version': mmengine.__version__,
    }
    if getattr(dataset, 'metainfo', None):
        meta['dataset_meta'] = dict(dataset.metainfo)
    state = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    checkpoint: dict[str, Any] = {'meta': meta, 'state_dict': state}
    if through_hooks:
        runner.call_hook('before_save_checkpoint', checkpoint=checkpoint)
        checkpoint = {k: checkpoint[k] for k in ('meta', 'state_dict')}
    return checkpoint


def save_snapshot(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a snapshot from the main process, atomically; all ranks wait."""
    if is_main_process():
        write_checkpoint(checkpoint, path)
    barrier()


def state_dict_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by name, without the prefix that DDP adds."""
    state = checkpoint.get('state_dict', checkpoint)
    return {re.sub(r'^module\.', '', k): v for k, v in state.items()}


def _recipe(model: nn.Module) -> Recipe:
    return model.gplq.recipe  # type: ignore[union-attr, return-value]


def _other_shapes(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    own = model.state_dict()
    return [
        f'{k} {tuple(state[k].shape)}, model {tuple(own[k].shape)}'
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]


def _broken(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Names of tensors with NaN, or with infinity where no mask can have it."""
    finite = {*quantization_keys(model), *(name for name, _ in model.named_parameters())}
    return [
        name
        for name, value in state.items()
        if isinstance(value, Tensor)
        and not bool((value.isfinite() if name in finite else ~value.isnan()).all())
    ]


def _require_same_keys(model: nn.Module, state: Mapping[str, Any]) -> None:
    own = model.state_dict()
    remedy = 'use the config that the checkpoint was made with'
    shapes = _other_shapes(model, state)
    for what, names in (
        ('missing keys', sorted(set(own) - set(state))),
        ('keys that the model does not have', sorted(set(state) - set(own))),
        ('other shapes', shapes),
    ):
        if names:
            _refuse(model, what, names, remedy)


def _refuse(
    model: nn.Module,
    what: str,
    names: Iterable[str],
    remedy: str = 'give the FP32 checkpoint of exactly this model with load_from',
) -> None:
    names = list(names)
    more = f' and {len(names) - 4} more' if len(names) > 4 else ''
    raise ValueError(
        f'the checkpoint does not fit {type(model).__name__}: {what}: {", ".join(names[:4])}{more};'
        f' {remedy}'
    )
