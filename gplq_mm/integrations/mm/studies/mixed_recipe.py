# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""From a measured sensitivity to bits under a budget, their cost, and a config."""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from .... import __version__
from ....analysis import bit_operations, model_bytes
from ....analysis.bit_assignment import (
    Choice,
    Errors,
    Increases,
    Product,
    assign_bits,
    check_budget,
    product_groups,
    size_groups,
    uniform_plans,
)
from ....analysis.bit_search import search_bits
from ....analysis.cost import FLOAT_BITS
from ....analysis.operands import Precision, bit_rules, quantized_as
from ....ops import operations
from ....stream.stored_file import unfinished_file
from .measured_sensitivity import SensitivityRun

_UNIFORM = re.compile(r'w([2-8])a([2-8])', re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """Limits of a bit assignment: mean bits of weights and activations, or bit operations.

    Attributes:
        weight_bits: Mean bits over all measured weight values.
        activation_bits: Mean bits over all elements of the measured activations.
        bops: Bit operations of one image, in billions, or ``w3a3`` for those of that uniform
            setting.
    """

    weight_bits: float | None = None
    activation_bits: float | None = None
    bops: str | None = None

    def __post_init__(self) -> None:
        if self.bops is not None and (self.weight_bits or self.activation_bits):
            raise ValueError('give --bops or mean bits, not both: two budgets may contradict')

    def __bool__(self) -> bool:
        return any(v is not None for v in (self.weight_bits, self.activation_bits, self.bops))

    def __str__(self) -> str:
        parts = {'mean weight bits': self.weight_bits, 'mean activation bits': self.activation_bits}
        words = [f'{name} {value:g}' for name, value in parts.items() if value is not None]
        return ', '.join([*words, *([f'BOPs {self.bops}'] if self.bops else [])])


@dataclass(frozen=True)
class _Problem:
    groups: list[list[Choice]]
    bound: float
    describe: Callable[[float], str]


def check(run: SensitivityRun, budget: Budget) -> None:
    """Refuse a budget that the candidate bits cannot meet, before anything is measured.

    Raises:
        ValueError: If it cannot be met, or limits operands that are not measured.
    """
    unknown = {key: dict.fromkeys(run.data['settings']['bits'], 0.0) for key in run.measured}
    for problem in _problems(run, budget, unknown, {}):
        check_budget(problem.groups, problem.bound, problem.describe)


def assign(run: SensitivityRun, budget: Budget) -> dict[str, int]:
    """Bits by operand key: the assigned ones, and the current ones of all others.

    The additive optimum, the optimum with interactions and the uniform settings that fit
    are measured on the images, all operands at once; the best one is returned.

    Args:
        run: A finished measurement.
        budget: Limits of the assignment.

    Raises:
        ValueError: See ``check``.
    """
    bits = {key: operand.num_bits for key, operand in run.operands.items()}
    for problem in _problems(run, budget, run.increases, run.errors):
        plans = [assign_bits(problem.groups, problem.bound, problem.describe)]
        plans += uniform_plans(problem.groups, problem.bound)
        if run.errors:
            plans.insert(0, search_bits(problem.groups, problem.bound))
        settings = [{k: b for choice in plan for k, b in choice.bits.items()} for plan in plans]
        measured = [run.measure_together({**bits, **own}) for own in settings]
        bits.update(settings[measured.index(min(measured))])
    return bits


def uniform(run: SensitivityRun, weight: int, activation: int) -> dict[str, int]:
    """Bits by key of a uniform setting; operands that a rule pins keep their bits."""
    by_kind = {'weight': weight, 'activation': activation}
    return {k: o.num_bits if o.pinned else by_kind[o.kind] for k, o in run.operands.items()}


def mean_bits(run: SensitivityRun, bits: Mapping[str, int], kind: str) -> float | None:
    """Mean bits over the operands of a kind that no rule pins; None if there is none.

    Args:
        run: Gives the operands' sizes, the weights of the mean.
        bits: By key.
        kind: ``weight`` or ``activation``.
    """
    sizes = _sizes(run, [k for k, o in run.operands.items() if o.kind == kind and not o.pinned])
    total = sum(sizes.values())
    return sum(size * bits[key] for key, size in sizes.items()) / total if total else None


def cost(run: SensitivityRun, bits: Mapping[str, int]) -> tuple[int, int]:
    """Bit operations of one image and bytes of the packed model at some bits.

    Args:
        run: Its model's cost is counted as after stage 2.
        bits: By key, of all operands.
    """
    planned = {}
    for key, value in bits.items():
        path = run.operands[key].path
        quantizer = run.model.get_submodule(path)
        ones = torch.ones_like(quantizer.scale)
        spec = replace(quantizer.spec, num_bits=value)
        planned[path] = Precision(spec, ones, torch.zeros_like(ones))
    with quantized_as(run.model, planned):
        return bit_operations(run.model, run.macs), model_bytes(run.model)


def compare(run: SensitivityRun, bits: Mapping[str, int], budget: Budget) -> list[dict[str, Any]]:
    """The assignment compared with uniform settings: mean bits, cost, error increase.

    Args:
        run: A finished measurement.
        bits: The assignment, by key.
        budget: Its limits.

    Returns:
        One row per setting: ``name``, ``weight_bits``, ``activation_bits``, ``bops``,
        ``model_bytes``, ``damage``, ``score`` (None if the setting
        changes operands of a kind that was not measured). ``damage`` is the error increase with
        all operands quantized at once.
    """
    rows = []
    for name, setting in {**_uniform_settings(run, budget), 'mixed': dict(bits)}.items():
        bops, size = cost(run, setting)
        increase = run.measure_together(setting) if _is_measurable(run, setting) else None
        rows.append(
            {
                'name': name,
                'weight_bits': mean_bits(run, setting, 'weight'),
                'activation_bits': mean_bits(run, setting, 'activation'),
                'bops': bops,
                'model_bytes': size,
                'damage': increase,
                'score': None if increase is None else run.meter.metric.score(increase),
            }
        )
    return rows


def mixed_recipe(recipe: Any, run: SensitivityRun, bits: Mapping[str, int]) -> dict[str, Any]:
    """A config's recipe with the rules of an assignment after its own.

    Args:
        recipe: ``model.recipe`` of the config: a preset's name or a dict.
        run: Gives the operands.
        bits: By key.
    """
    own = {'base': recipe} if isinstance(recipe, str) else Config(dict(r=recipe)).to_dict()['r']
    means = {kind: mean_bits(run, bits, kind) for kind in ('weight', 'activation')}
    words = [f'{kind}s {value:.2f} bits' for kind, value in means.items() if value is not None]
    rules = [*own.get('rules', []), *bit_rules(run.operands, bits)]
    return {**own, 'name': f'mixed ({", ".join(words)})', 'rules': rules}


def write_config(path: Path, base: str, recipe: Mapping[str, Any], remark: str) -> None:
    """Write a config that builds on another one and changes its recipe.

    Args:
        path: Output file; an existing one is replaced atomically.
        base: The config to build on.
        recipe: The whole recipe.
        remark: Comment in its first line.
    """
    relative = os.path.relpath(base, path.parent)
    lines = [f'    {key}={value!r},' for key, value in recipe.items() if key != 'rules']
    rules = [f'        {rule!r},' for rule in recipe['rules']]
    text = '\n'.join(
        [
            f'# {remark}',
            f'_base_ = {relative!r}',
            'recipe = dict(',
            *lines,
            '    rules=[',
            *rules,
            '    ])',
            'model = dict(recipe=dict(_delete_=True, **recipe))',
            '',
        ]
    )
    with unfinished_file(path) as unfinished:
        unfinished.write_text(text, encoding='utf-8')


def describe_origin(run: SensitivityRun, budget: Budget) -> str:
    """Origin of an assignment, for the first line of its config."""
    return (
        f'gplq_mm {__version__}: bits under {budget}, from {run.path.name} '
        f'({run.data["settings"]["metric"]})'
    )


def _problems(
    run: SensitivityRun, budget: Budget, increases: Increases, errors: Errors
) -> list[_Problem]:
    problems = []
    for kind, bound in (('weight', budget.weight_bits), ('activation', budget.activation_bits)):
        if bound is not None:
            problems.append(_mean_bits_problem(run, kind, bound, increases, errors))
    if budget.bops is not None:
        problems.append(_bops_problem(run, budget.bops, increases, errors))
    return problems


def _mean_bits_problem(
    run: SensitivityRun, kind: str, bound: float, increases: Increases, errors: Errors
) -> _Problem:
    own = {k: d for k, d in increases.items() if run.operands[k].kind == kind}
    if not own:
        raise ValueError(
            f'a budget of mean {kind} bits needs the {kind}s measured; add --kind {kind}'
        )
    sizes = _sizes(run, own)
    total = sum(sizes.values())
    groups = size_groups(own, sizes, errors)
    limit = math.floor(bound * total * (1 + 1e-12))
    return _Problem(groups, limit, lambda c: f'{c / total:.3g} mean {kind} bits')


def _bops_problem(run: SensitivityRun, bops: str, increases: Increases, errors: Errors) -> _Problem:
    products = _products(run, set(increases))
    free = [p for p in products if p.free()]
    inside = sum(run.macs.layers.values())
    fixed = max(run.macs.total - inside, 0) * FLOAT_BITS**2
    fixed += sum(p.bit_operations({}) for p in products if not p.free())
    bound = _bops_of(run, bops) - fixed
    return _Problem(
        product_groups(increases, free, errors), bound, lambda c: f'{(c + fixed) / 1e9:.5g} G BOPs'
    )


def _bops_of(run: SensitivityRun, text: str) -> float:
    label = _UNIFORM.fullmatch(text)
    if label:
        return cost(run, uniform(run, int(label[1]), int(label[2])))[0]
    try:
        return float(text) * 1e9
    except ValueError:
        raise ValueError(
            f'--bops {text!r}: write billions of bit operations per image, such as 12.5, or a '
            'uniform setting, such as w3a3'
        ) from None


def _products(run: SensitivityRun, free: set[str]) -> list[Product]:
    """Every counted matrix product; operands that are not assigned keep their current bits."""
    key_of = {id(run.model.get_submodule(o.path)): key for key, o in run.operands.items()}
    products = []
    found = operations(run.model)
    for name, macs in run.macs.layers.items():
        keys = [key_of[id(quantizer)] for quantizer in found[name].quantizers]
        sides = [key if key in free else run.operands[key].num_bits for key in keys]
        products.append(Product(macs, *sides))
    return products


def _sizes(run: SensitivityRun, keys: Any) -> dict[str, int]:
    """Weights or elements by key."""
    return {k: run.operands[k].weights or run.elements.get(k, 0) for k in keys}


def _uniform_settings(run: SensitivityRun, budget: Budget) -> dict[str, dict[str, int]]:
    """W4A4, W3A3, and the current activation bits with the weight bits that a budget allows."""
    labels = {(4, 4), (3, 3)}
    activation = run.data['settings']['recipe']['activation']['num_bits']
    if 'activation' not in run.kinds:
        labels |= {(4, activation), (3, activation)}
    if budget.weight_bits:
        labels.add((math.floor(budget.weight_bits), activation))
    return {f'W{w}A{a}': uniform(run, w, a) for w, a in sorted(labels, reverse=True)}


def _is_measurable(run: SensitivityRun, bits: Mapping[str, int]) -> bool:
    """Whether only measured kinds differ from the model's current bits."""
    return all(
        operand.kind in run.kinds or operand.num_bits == bits[key]
        for key, operand in run.operands.items()
    )
