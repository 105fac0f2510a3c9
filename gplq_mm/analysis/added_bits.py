# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Additional bits for the activations of some roles: in place, as rules, from a checkpoint."""

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..convert import quantizers
from ..quantizers import FakeQuantizer
from ..recipe import Recipe, plain
from .operands import find_operands

ADD_BITS = 'add_bits'
"""Action of a recipe's gate that adds bits if the feature error is too large."""


def adds_bits(recipe: Recipe) -> bool:
    """Whether a recipe allows its gate to add bits.

    Examples:
        >>> from gplq_mm.recipe import as_recipe
        >>> adds_bits(as_recipe('auto')), adds_bits(as_recipe('w4a4'))
        (True, False)
    """
    return recipe.gate is not None and recipe.gate.action == ADD_BITS


def add_bits_(model: nn.Module, roles: Iterable[str], num_bits: int) -> int:
    """Raise the bits of activations of some roles, in place; their calibration becomes invalid.

    Args:
        model: Converted model.
        roles: Roles of the operands.
        num_bits: New bits; operands with at least as many are not changed.

    Returns:
        Number of operands changed.
    """
    chosen = _below(model, roles, num_bits)
    for quantizer in chosen:
        quantizer.set_spec(replace(quantizer.spec, num_bits=num_bits))
    return len(chosen)


def bit_rules_of_roles(
    model: nn.Module, roles: Iterable[str], num_bits: int
) -> list[dict[str, Any]]:
    """Rules equivalent to ``add_bits_``, to append to the recipe's rules; call it before.

    Args:
        model: Converted model, before its bits change.
        roles: As for ``add_bits_``.
        num_bits: As for ``add_bits_``.

    Returns:
        One rule per role, and one for each of its operands that has more bits.
    """
    rules: list[dict[str, Any]] = []
    operands = find_operands(model, kinds=('activation',)).values()
    for role in roles:
        rules.append({'role': role, 'activation': {'num_bits': num_bits}})
        rules += [
            {'name': glob.escape(o.name), 'activation': {'num_bits': o.num_bits}}
            for o in operands
            if o.role == role and o.num_bits > num_bits
        ]
    return rules


def with_added_rules(recipe: Recipe, made_with: Mapping[str, Any]) -> Recipe:
    """A recipe with the rules that a gate added to the recipe of a checkpoint.

    Args:
        recipe: Recipe.
        made_with: Recipe of the checkpoint as a dict.

    Returns:
        The same recipe unless both allow added bits.
    """
    own, rules = plain(recipe.rules), plain(made_with.get('rules', ()))
    added_bits = (made_with.get('gate') or {}).get('action') == ADD_BITS
    if not (adds_bits(recipe) and added_bits) or rules[: len(own)] != own:
        return recipe
    return recipe.change(rules=rules)


def adopt_rules_(model: nn.Module, recipe: Recipe, made_with: Mapping[str, Any]) -> Recipe:
    """Apply the bits that a run's gate added, from the recipe in its checkpoint.

    Args:
        model: Converted model; its activation quantizers, calibrated or not, get the bits.
        recipe: Its recipe.
        made_with: Recipe of the checkpoint as a dict.

    Returns:
        The recipe with the added rules; unchanged unless both recipes allow added bits.
    """
    adopted = with_added_rules(recipe, made_with)
    for rule in adopted.rules[len(recipe.rules) :]:
        if rule.role is not None:
            add_bits_(model, [rule.role], rule.settings_of('activation')['num_bits'])
    return adopted


def adopt_bits(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
    """Load pre-hook: raise the bits of activations to those of a state dict.

    For callers of ``load_state_dict`` without a check, such as mmdet's ``init_detector``.

    Args:
        model: Converted model.
        state_dict: State dict to load.
        prefix: Prefix of the model's keys.
        *args: Further arguments of a pre-hook, unused.
    """
    for name, quantizer in quantizers(model, 'activation').items():
        codes = state_dict.get(f'{prefix}{name}.quant_range')
        if codes is not None:
            num_bits = int(codes[1] - codes[0]).bit_length()
            if num_bits > quantizer.spec.num_bits:
                quantizer.set_spec(replace(quantizer.spec, num_bits=num_bits))


def _below(model: nn.Module, roles: Iterable[str], num_bits: int) -> Sequence[FakeQuantizer]:
    chosen, found = set(roles), quantizers(model, 'activation').values()
    return [q for q in found if q.role in chosen and q.spec.num_bits < num_bits]
