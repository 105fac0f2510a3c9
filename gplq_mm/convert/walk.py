# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""``convert_``: attach quantizers to a float model, in place."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..compat.torch import ConvNd
from ..ops import QuantizedLayer
from ..quantizers import FakeQuantizer
from ..recipe import Recipe, RecipeLike, RuleBook, as_recipe, in_scope
from .handlers import TURNED_OFF, build_quantizer, find_handler
from .model_facts import facts_of
from .roles import give_roles

_ATTENTION = re.compile(r'(attention|attn|attntion|msa|xca)', re.IGNORECASE)


@dataclass
class CoverageReport:
    """The operations that a conversion quantized and those that stay float.

    Attributes:
        quantized: Names by kind: ``linear``, ``conv``, ``matmul``.
        kept_float: ``(name, reason)`` of operations that stay float inside the scope.
        scope: Name prefixes that were converted.
    """

    quantized: dict[str, list[str]] = field(
        default_factory=lambda: {'linear': [], 'conv': [], 'matmul': []}
    )
    kept_float: list[tuple[str, str]] = field(default_factory=list)
    scope: tuple[str, ...] = ('',)

    @property
    def counts(self) -> dict[str, int]:
        """Number of quantized operations per kind."""
        return {kind: len(names) for kind, names in self.quantized.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON report."""
        return {
            'counts': self.counts,
            'kept_float': [{'name': n, 'reason': r} for n, r in self.kept_float],
            'scope': list(self.scope),
        }

    def as_tree_dict(self) -> dict[str, Any]:
        """``as_dict`` with the names of the quantized operations by kind, ``quantized``."""
        return {**self.as_dict(), 'quantized': self.quantized}


class _Conversion:
    """State of a conversion; implements ``handlers.Context``."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.book = RuleBook(recipe.rules)
        self.report = CoverageReport(scope=recipe.prefixes)
        self.roles: dict[str, str] = {}
        self.skipped: list[str] = []

    def role(self, name: str, default: str = 'input') -> str:
        return self.roles.get(name, default)

    def set_role(self, name: str, role: str) -> None:
        self.roles[name] = role

    def activation(
        self,
        name: str,
        role: str,
        axis: int | None,
        size: int | None,
        row_axis: int | None = None,
    ) -> FakeQuantizer | None:
        base = self.recipe.activation
        return build_quantizer(self.book, base, 'activation', name, role, axis, size, row_axis)

    def weight(self, name: str, role: str, axis: int, size: int) -> FakeQuantizer | None:
        return build_quantizer(self.book, self.recipe.weight, 'weight', name, role, axis, size)

    def keep_float(self, name: str, reason: str) -> None:
        self.report.kept_float.append((name, reason))

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(name)
        if in_scope(name, self.report.scope):
            self.keep_float(name, reason)

    def count(self, kind: str, name: str) -> None:
        self.report.quantized[kind].append(name)

    def visit(self, name: str, module: nn.Module) -> None:
        if in_scope(name, self.skipped):
            return
        handler = find_handler(module)
        if handler is not None:
            handler(module, name, self)
        elif isinstance(module, ConvNd | nn.Linear | nn.Bilinear):
            cls = type(module)
            self.keep_float(name, f'no handler for {cls.__module__}.{cls.__qualname__}')
        elif _ATTENTION.search(type(module).__name__):
            self.keep_float(
                name, f'matmuls of the unknown attention class {type(module).__qualname__}'
            )


def convert_(model: nn.Module, recipe: RecipeLike, strict: bool = False) -> CoverageReport:
    """Attach quantizers to every supported operation in the recipe's scope.

    Classes are swapped in place: modules, attributes and state-dict keys do not change,
    quantizer state is added.

    Args:
        model: Float model; changed in place. Quantizers go to the device of its first
            parameter.
        recipe: Preset name or recipe (see ``as_recipe``).
        strict: Raise if an unknown layer or attention class in the scope stays float.

    Returns:
        Which operations are quantized and which stay float.

    Raises:
        ValueError: If the model is already converted, the scope or a rule matches
            nothing, nothing was quantized, or ``strict`` and a layer stays float.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
        >>> convert_(model, dict(scope='all')).counts
        {'linear': 1, 'conv': 0, 'matmul': 0}
    """
    resolved = as_recipe(recipe)
    if any(isinstance(m, FakeQuantizer) for m in model.modules()):
        raise ValueError('the model is already converted; build a new float model to convert')
    if resolved.scope == 'auto':
        resolved = resolved.change(scope=facts_of(model).scope)
    device = next((p.device for p in model.parameters()), None)
    conversion = _Conversion(resolved)
    _check_scope(model, conversion.report.scope)
    modules = list(model.named_modules())
    for name, module in modules:
        give_roles(module, name, conversion)
    for name, module in modules:
        if in_scope(name, conversion.report.scope):
            conversion.visit(name, module)
    _check_result(conversion, strict)
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantizer):
            module.name = name
            module.to(device)
    return conversion.report


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Quantized layers with a weight by name, in model order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def quantizers(model: nn.Module, kind: str | None = None) -> dict[str, FakeQuantizer]:
    """Quantizers by name, of one kind (``activation``, ``weight``) or all."""
    return {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, FakeQuantizer) and kind in (None, m.kind)
    }


def set_quantization(model: nn.Module, enabled: bool, kind: str | None = None) -> None:
    """Switch all quantizers of a kind on or off; with all off the model is the float model."""
    for quantizer in quantizers(model, kind).values():
        quantizer.enabled = enabled


@contextmanager
def floating(chosen: Iterable[FakeQuantizer]) -> Iterator[None]:
    """Context manager: some quantizers return their input; restored at the end."""
    before = [(quantizer, quantizer.enabled) for quantizer in chosen]
    try:
        for quantizer, _ in before:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, enabled in before:
            quantizer.enabled = enabled


def _check_scope(model: nn.Module, scope: tuple[str, ...]) -> None:
    names = {name for name, _ in model.named_modules()}
    for prefix in scope:
        if prefix not in names:
            children = sorted(name for name, _ in model.named_children())
            raise ValueError(
                f'scope {prefix!r} matches no module of {type(model).__name__}; '
                f'its children are {children}'
            )


def _check_result(conversion: _Conversion, strict: bool) -> None:
    for rule in conversion.book.unmatched():
        raise ValueError(
            f'recipe rule {rule.as_dict()} matches no layer in the scope '
            f'{list(conversion.report.scope)}; correct its name, role or settings (a setting may '
            'be one that has no effect there), or remove it'
        )
    if not any(conversion.report.counts.values()):
        raise ValueError(
            f'nothing was quantized: no Linear, Conv or attention matmul is left in the scope '
            f'{list(conversion.report.scope)}; widen the scope or the rules'
        )
    unknown = [
        f'{n} ({r})'
        for n, r in conversion.report.kept_float
        if r != TURNED_OFF and n not in conversion.skipped
    ]
    if strict and unknown:
        raise ValueError(f'strict=True, but these stay float: {"; ".join(unknown)}')
