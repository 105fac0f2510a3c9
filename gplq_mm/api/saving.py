# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""``gplq_mm.save`` and ``gplq_mm.load``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..analysis.added_bits import with_added_rules
from ..deployment.packed_file import ABOUT, packed_checkpoint
from ..recipe import RecipeLike, as_recipe, recipe_difference
from ..recipe.recorded import recorded_recipe
from ..version import __version__
from .checkpoint_file import load_file, write_checkpoint
from .model_state import CALIBRATED, STAGE1, STAGE2, STAGES, require_stage
from .quantizing import quantize

FORMAT_VERSION = 1
KEY = 'gplq'


def save(model: nn.Module, path: str | Path, packed: bool = False, fp16: bool = False) -> None:
    """Write a calibrated model's weights, quantizers and recipe atomically.

    Args:
        model: Model of ``gplq_mm.quantize``, calibrated.
        path: Output file; an existing one is replaced when the new one is complete. The suffix
            ``.safetensors`` gives a file in the layout of the safetensors library.
        packed: Store the integer weight codes (``docs/deployment.md``): the file of deployment.
            The loaded model has the same codes and outputs; stage 2 cannot be repeated from it.
        fp16: With ``packed``: store float tensors in float16. Outputs then differ.

    Raises:
        ValueError: If the model is not quantized or not calibrated; with ``packed``, if its
            weights are not quantized.
        OSError: If the file cannot be written; an existing file does not change.
    """
    if fp16 and not packed:
        raise ValueError('fp16=True belongs to packed files; write packed=True, fp16=True')
    state = require_stage(model, (CALIBRATED, STAGE1, STAGE2))
    if packed and state.stage != STAGE2:
        raise ValueError(
            f'packed=True stores integer weights, the model is at stage {state.stage!r}; write '
            'gplq_mm.quantize_weights(model, loader) before this call'
        )
    about = {
        'format_version': FORMAT_VERSION,
        'gplq_mm_version': __version__,
        'model': type(model).__name__,
        'stage': state.stage,
        'recipe': state.recipe.as_dict(),
        'coverage': state.coverage.as_dict(),
    }
    if packed:
        write_checkpoint(packed_checkpoint(model, {KEY: about}, fp16), path)
        return
    weights = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    write_checkpoint({KEY: about, 'state_dict': weights}, path)


def load(path: str | Path, float_model: nn.Module, recipe: RecipeLike | None = None) -> nn.Module:
    """Quantize a float model with a checkpoint's recipe and load the checkpoint's weights.

    Args:
        path: File of ``gplq_mm.save``, or packed file of ``tools/deploy.py``; read with
            ``weights_only=True``, so no code in it runs.
        float_model: Model of the same architecture, with any weights; changed in place.
        recipe: Recipe that the checkpoint must have been made with; None: the checkpoint's own.

    Returns:
        ``float_model``, quantized, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no file of ``gplq_mm.save``, or made with another recipe or for
            another model; ``float_model`` is unchanged if the recipe or the file is wrong.
    """
    checkpoint = load_file(path)
    about = _about(checkpoint, path)
    if recipe is not None:
        _require_recipe(about['recipe'], recipe, path)
    state = checkpoint['state_dict']
    try:
        quantize(float_model, about['recipe'])
    except ValueError as error:
        raise ValueError(f'{path} does not fit {type(float_model).__name__}: {error}') from error
    _require_keys(float_model, state, path)
    float_model.load_state_dict(state)
    float_model.gplq.stage = about['stage']  # type: ignore[union-attr]
    return float_model.eval()


def _about(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    about = checkpoint.get(KEY)
    if isinstance(about, dict) and ABOUT in about and 'format_version' not in about:
        return {**about, 'recipe': recorded_recipe(about['recipe'])}  # of tools/deploy.py
    if not isinstance(about, dict) or 'format_version' not in about:
        raise ValueError(
            f'{path} was not written by gplq_mm.save or tools/deploy.py; give such a file'
        )
    if about['format_version'] != FORMAT_VERSION or about['stage'] not in STAGES:
        raise ValueError(
            f'{path} has format {about["format_version"]} of gplq_mm {about["gplq_mm_version"]}, '
            f'this is gplq_mm {__version__} with format {FORMAT_VERSION}; install that version'
        )
    return about


def _require_recipe(made_with: Mapping[str, Any], recipe: RecipeLike, path: str | Path) -> None:
    """Compare recipes; added bits, values of ``auto`` and the scope may be in one only."""
    found = recipe_difference(made_with, with_added_rules(as_recipe(recipe), made_with).as_dict())
    differences = [d for d in found if not d.endswith("'auto'") and 'all_if_fewer' not in d]
    if differences:
        raise ValueError(
            f'{path} was made with another recipe; checkpoint != yours: {"; ".join(differences)}'
        )


def _require_keys(model: nn.Module, state: Mapping[str, Any], path: str | Path) -> None:
    own = model.state_dict()
    shapes = [
        f'{k} {tuple(state[k].shape)}, model {tuple(own[k].shape)}'
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    for what, names in (
        ('missing keys', sorted(set(own) - set(state))),
        ('keys that the model does not have', sorted(set(state) - set(own))),
        ('other shapes', shapes),
    ):
        if names:
            raise ValueError(
                f'{path} does not fit {type(model).__name__}: {what}: {", ".join(names[:4])}'
                f'{f" and {len(names) - 4} more" if len(names) > 4 else ""}; give the float model '
                'that was quantized'
            )
