# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Whether a resumed run would continue the training that its checkpoint is of."""

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log

from ....recipe import recipe_difference
from ....recipe.recorded import recorded_recipe
from .config_text import parse_config_text
from .run_checkpoint import KEY

_OF_CONFIG = ('optim_wrapper', 'param_scheduler', 'auto_scale_lr')
_AFTER_TRAINING = ('name', 'gate', 'weight.ptq', 'weight.num_bits', 'stage2.', 'rules')
"""Recipe keys that decide what follows stage 1; whether weights fit, ``check_quantized`` says."""


def require_same_training(
    checkpoint: Mapping[str, Any], cfg: Config, recipe: Mapping[str, Any]
) -> None:
    """Refuse to resume with settings that the checkpoint's optimizer, schedule or scales ignore.

    MMEngine restores learning rates, schedule, iteration and seed from the checkpoint, whatever
    the config says, and calibration is done. A resumed run would then be neither the old run
    nor the one of the config.

    Args:
        checkpoint: Training checkpoint of a GPLQ run.
        cfg: The resumed run's config.
        recipe: Its full recipe, as a plain dict.

    Raises:
        ValueError: Naming each setting with both values.
    """
    meta, made_with = checkpoint['meta'], recorded_recipe(checkpoint[KEY]['recipe'])
    ignored = tuple(f'recipe.{key}' for key in _AFTER_TRAINING)
    of_recipe = recipe_difference(made_with, _known(recorded_recipe(recipe), made_with), 'recipe.')
    found = [line for line in of_recipe if not line.startswith(ignored)]
    then, now = _settings_of(meta.get('cfg', ''), cfg.pretty_text)
    found += recipe_difference(then, now)
    seed = (cfg.get('randomness') or {}).get('seed')
    if seed is not None and seed != meta.get('seed', seed):
        found.append(f'randomness.seed: {meta["seed"]} != {seed}')
    if found:
        raise ValueError(
            'a resumed run goes on with the settings that it began with; checkpoint != config: '
            f'{"; ".join(found)}; write the old values, or begin a new run: without --resume, in '
            'another --work-dir'
        )


def _known(recipe: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a recipe that an earlier version of the package wrote too."""
    return {
        key: _known(value, earlier[key])
        if isinstance(value, Mapping) and isinstance(earlier[key], Mapping)
        else value
        for key, value in recipe.items()
        if key in earlier
    }


def _settings_of(*texts: str) -> list[dict[str, Any]]:
    """Settings in the texts of two configs; nothing where one has more than plain values."""
    try:
        return [_settings(parse_config_text(text)) for text in texts]
    except ValueError as error:
        print_log(f'learning rate and batch size are not compared: {error}', logger='current')
        return [{} for _ in texts]


def _settings(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What stage 1 of a config depends on and a resume takes from the checkpoint."""
    loader = cfg.get('train_dataloader') or {}
    sampler = loader.get('batch_sampler') or {}
    size = loader.get('batch_size') or sampler.get('batch_size')
    return {'train_dataloader.batch_size': size, **{key: cfg.get(key) for key in _OF_CONFIG}}
