# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Operands of a model, and their quantization with other bits."""

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import quantized_layers
from ..convert.roles import child_name
from ..ops import Operand, Operation, QuantizedLayer, operations
from ..ptq import PTQTask, WeightPTQ
from ..quantizers import FakeQuantizer, Observer, QuantSpec, integer_range
from ..recipe import Rule, sets_bits
from ..stream.evaluating import evaluating

KINDS = ('weight', 'activation')


@dataclass(frozen=True)
class ModelOperand:
    """An operand in a model: a layer's weight or input, or one side of a matmul.

    Attributes:
        name: Name that rules match: the layer's name, or ``<matmul>.lhs``, ``<matmul>.rhs``.
        kind: ``weight`` or ``activation``.
        module: Dotted name of its layer or matmul.
        path: Dotted name of its quantizer.
        role: Role, one of ``recipe.ROLES``.
        num_bits: Current bits.
        pinned: Whether a rule of the recipe, not its general setting, sets the bits.
        weights: Number of weights; 0 for an activation.
    """

    name: str
    kind: str
    module: str
    path: str
    role: str
    num_bits: int
    pinned: bool
    weights: int = 0

    @property
    def key(self) -> str:
        """Unique name, ``weight:backbone.fc`` or ``activation:backbone.fc``."""
        return f'{self.kind}:{self.name}'


@dataclass(frozen=True)
class Precision:
    """State of a quantizer (and weight of its layer) for given bits.

    Attributes:
        spec: Spec with these bits.
        scale: Scale, shape as stored by the quantizer.
        zero_point: Same shape.
        weight: Values on the grid, shape of the layer's weight; None for an activation.
        levels: Table of a logarithmic code, if it has one.
    """

    spec: QuantSpec
    scale: Tensor
    zero_point: Tensor
    weight: Tensor | None = None
    levels: Tensor | None = None


def find_operands(
    model: nn.Module, rules: Sequence[Rule] = (), kinds: Sequence[str] = KINDS
) -> dict[str, ModelOperand]:
    """All operands of some kinds by their key, in model order.

    Args:
        model: Converted model.
        rules: Rules of its recipe, which determine the pinned operands.
        kinds: ``weight``, ``activation`` or both.

    Raises:
        ValueError: If a kind is unknown or missing, or the model has no such operand.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise ValueError(f'kind={unknown or list(kinds)}: write one or both of {list(KINDS)}')
    found, known = {}, set()
    for path, operation in operations(model).items():
        for own in operation.operands().values():
            if own.kind in kinds and id(own.quantizer) not in known:
                operand = _in_model(path, own, rules)
                found[operand.key] = operand
            known.add(id(own.quantizer))  # operations can share a quantizer
    if not found:
        raise ValueError(f'the model has no quantized {" or ".join(kinds)}; convert it first')
    return found


def check_bits(bits: Sequence[int]) -> list[int]:
    """Candidate bits, sorted and without duplicates.

    Raises:
        ValueError: If there is none, or one is not from 2 to 8.

    Examples:
        >>> check_bits([8, 2, 4, 2])
        [2, 4, 8]
    """
    if not bits:
        raise ValueError('no candidate bits; write at least one, e.g. bits=[2, 3, 4, 8]')
    for value in bits:
        integer_range(value, True)
    return sorted(set(bits))


@torch.no_grad()
def weight_precisions(
    model: nn.Module, operand: ModelOperand, bits: Sequence[int], algorithms: Sequence[WeightPTQ]
) -> dict[int, Precision]:
    """A layer's weight quantized to each candidate; the layer is restored.

    Args:
        model: Converted model, weights float.
        operand: Operand of kind ``weight``.
        bits: Candidate bits.
        algorithms: Weight PTQ algorithms that need no data, in order.
    """
    layer = quantized_layers(model)[operand.module]
    weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    found = {}
    for value in bits:
        with _restoring(layer.weight_quantizer, layer):
            _set_spec(layer.weight_quantizer, value)
            for algorithm in algorithms:
                algorithm.apply(PTQTask(model, {operand.module: layer}, {operand.module: weight}))
            found[value] = _present(layer.weight_quantizer, layer)
    return found


def activation_precisions(observer: Observer, bits: Sequence[int]) -> dict[int, Precision]:
    """Precisions of an activation for each candidate, all from one observer.

    Args:
        observer: Result of ``observe_activations`` for the operand.
        bits: Candidate bits.
    """
    own, found = observer.spec, {}
    try:
        for value in bits:
            observer.spec = replace(own, num_bits=value)
            qparams, levels = observer.calculate_qparams(), observer.calculate_levels()
            found[value] = Precision(observer.spec, *qparams, levels=levels)
    finally:
        observer.spec = own
    return found


@contextmanager
def quantized_as(model: nn.Module, chosen: Mapping[str, Precision]) -> Iterator[None]:
    """Context manager: some operands are quantized with given bits; restored exactly at the end.

    Args:
        model: Converted model.
        chosen: Precision by the path of the quantizer.
    """
    holders: dict[int, Any] = {id(q): m for m in operations(model).values() for q in m.quantizers}
    with ExitStack() as stack:
        for path, precision in chosen.items():
            quantizer = model.get_submodule(path)
            assert isinstance(quantizer, FakeQuantizer)
            layer = holders[id(quantizer)] if precision.weight is not None else None
            stack.enter_context(_restoring(quantizer, layer))
            _set_spec(quantizer, precision.spec.num_bits)
            if precision.levels is not None:
                quantizer.set_levels(precision.levels)
            quantizer.set_qparams(precision.scale, precision.zero_point)
            quantizer.enabled = True
            if layer is not None and precision.weight is not None:
                _write(layer, precision.weight)
        yield


@contextmanager
def baseline(model: nn.Module, quantize_activations: bool) -> Iterator[None]:
    """Context manager: weights are float; activations are quantized only if requested."""
    found = [m for m in model.modules() if isinstance(m, FakeQuantizer)]
    enabled = [q.enabled for q in found]
    try:
        for quantizer in found:
            quantizer.enabled = quantizer.kind == 'activation' and quantize_activations
        with evaluating(model):
            yield
    finally:
        for quantizer, value in zip(found, enabled, strict=True):
            quantizer.enabled = value


@torch.no_grad()
def count_elements(
    model: nn.Module, operands: Mapping[str, ModelOperand], run: Callable[[], Any]
) -> dict[str, int]:
    """Elements of each activation operand in one forward pass, by key.

    Args:
        model: Converted model, quantizers on.
        operands: Operands to count; weights are ignored.
        run: Runs the model once.
    """
    keys = {o.path: key for key, o in operands.items() if o.kind == 'activation'}
    counts = dict.fromkeys(keys.values(), 0)

    def hook_of(path: str) -> Callable[..., None]:
        def hook(operation: Operation, inputs: tuple[Any, ...]) -> None:
            for operand, value in zip(operation.operands().values(), inputs, strict=False):
                key = keys.get(child_name(path, f'{operand.name}_quantizer'))
                if key is not None:
                    counts[key] += value.numel()

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(hook_of(path))
        for path in operations(model)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return counts


def bit_rules(
    operands: Mapping[str, ModelOperand], bits: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Recipe rules that set the bits of operands; none for operands that already have them.

    Args:
        operands: Result of ``find_operands``.
        bits: Bits by key.

    Returns:
        Rules to append to the recipe's rules.

    Examples:
        >>> fc = ModelOperand('fc', 'weight', 'fc', 'fc.weight_quantizer', 'input', 4, False)
        >>> bit_rules({fc.key: fc}, {fc.key: 3})
        [{'name': 'fc', 'weight': {'num_bits': 3}}]
    """
    changed: dict[str, dict[str, int]] = {}
    for key, value in bits.items():
        operand = operands[key]
        if value != operand.num_bits:
            changed.setdefault(operand.name, {})[operand.kind] = value
    return [_rule(name, kinds) for name, kinds in changed.items()]


def _rule(name: str, kinds: Mapping[str, int]) -> dict[str, Any]:
    rule: dict[str, Any] = {'name': glob.escape(name)}
    if len(kinds) == len(KINDS) and len(set(kinds.values())) == 1:
        return {**rule, 'num_bits': next(iter(kinds.values()))}
    return {**rule, **{kind: {'num_bits': value} for kind, value in kinds.items()}}


def _in_model(path: str, operand: Operand, rules: Sequence[Rule]) -> ModelOperand:
    """Operand of an operation with its names in the model."""
    quantizer, name = operand.quantizer, path + operand.suffix
    return ModelOperand(
        name,
        operand.kind,
        path,
        child_name(path, f'{operand.name}_quantizer'),
        operand.role,
        quantizer.spec.num_bits,
        sets_bits(rules, operand.kind, name, operand.role),
        0 if operand.weight is None else operand.weight.numel(),
    )


def _set_spec(quantizer: FakeQuantizer, num_bits: int) -> None:
    quantizer.set_spec(replace(quantizer.spec, num_bits=num_bits))


def _present(quantizer: FakeQuantizer, layer: QuantizedLayer | None) -> Precision:
    weight = None if layer is None else layer.weight.detach().clone()
    scale, zero_point = quantizer.scale.detach().clone(), quantizer.zero_point.clone()
    levels = quantizer.levels.clone() if quantizer.spec.is_log else None
    return Precision(quantizer.spec, scale, zero_point, weight, levels)


@torch.no_grad()
def _write(layer: QuantizedLayer, weight: Tensor) -> None:
    layer.weight.copy_(weight)


@contextmanager
def _restoring(quantizer: FakeQuantizer, layer: QuantizedLayer | None) -> Iterator[None]:
    before = _present(quantizer, layer)
    was_calibrated, was_enabled = quantizer.is_calibrated, quantizer.enabled
    try:
        yield
    finally:
        _set_spec(quantizer, before.spec.num_bits)
        if before.levels is not None:
            quantizer.set_levels(before.levels)
        quantizer.set_qparams(torch.ones_like(before.scale), before.zero_point)
        if not was_calibrated:
            quantizer.reset()
        with torch.no_grad():
            quantizer.scale.copy_(before.scale)  # unchecked: stage 1 may have made it negative
        quantizer.enabled = was_enabled
        if layer is not None and before.weight is not None:
            _write(layer, before.weight)
