# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Precision in which a quantized model in torch computes each operation, seen in one pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..convert.handlers import TURNED_OFF
from ..ops import Operation, operations
from ..ops.dispatch import choose, explain
from ..ptq.corrections.side_branch import compensated_blocks
from ..quantizers import FakeQuantizer

FLOAT = 'float32'
NOT_CALLED = 'not called'
TRAINING_ONLY = 'gradients are disabled'
"""Why backends of training steps refuse, which says nothing about inference."""


class OperationPrecision(NamedTuple):
    """How one operation is computed.

    Attributes:
        operation: Its name in the model.
        kind: ``linear``, ``conv``, ``matmul``, or ``branch`` for a float side branch.
        precision: Bits of the operands that are multiplied: ``int4 x int4``; ``float32``;
            ``not called`` if the forward pass did not reach it.
        backend: Name of the backend that computes it: ``integer``, ``exact`` (integers held in
            floating point), ``reference``; empty where none is asked.
        reason: Why other backends refuse it, or why it runs in float.
        is_wanted_float: Whether a rule of the recipe keeps it float.
    """

    operation: str
    kind: str
    precision: str
    backend: str = ''
    reason: str = ''
    is_wanted_float: bool = False

    @property
    def is_float(self) -> bool:
        """Whether it runs in float although the recipe's scope has it and no rule says so."""
        return self.precision == FLOAT and not self.is_wanted_float


def operation_precisions(model: nn.Module, run: Callable[[], Any]) -> list[OperationPrecision]:
    """Run a quantized model once and list the precision of every operation of its scope.

    An operation that is called more than once is listed once, in float if one of its calls is.

    Args:
        model: Model of ``gplq_mm.quantize`` or of ``type='gplq_mm.GPLQ'``.
        run: Runs the model once, on any images: the choice of a backend depends on sizes and
            types, not on values.

    Returns:
        Operations in the order of the model, then those that the conversion left float.

    Raises:
        ValueError: If the model is not quantized.

    Examples:
        >>> import gplq_mm
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        >>> coverage = gplq_mm.quantize(model, 'w4a4')
        >>> result = gplq_mm.calibrate(model, torch.randn(32, 5, 4).split(8))
        >>> result = gplq_mm.quantize_weights(model, torch.randn(32, 5, 4).split(8))
        >>> found = operation_precisions(model, lambda: model(torch.randn(2, 5, 4)))
        >>> [(entry.operation, entry.precision) for entry in found]
        [('0', 'int4 x int4'), ('2', 'int4 x int4')]
    """
    if not hasattr(model, 'gplq'):
        raise ValueError(
            f'{type(model).__name__} is not quantized; give a model of gplq_mm.quantize, or one '
            "built with type='gplq_mm.GPLQ'"
        )
    seen: dict[str, OperationPrecision] = {}
    found = operations(model)
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(_recorder(name, seen), with_kwargs=True)
        for name in found
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            run()
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    listed = [
        seen.get(name, OperationPrecision(name, operation.kind, NOT_CALLED))
        for name, operation in found.items()
    ]
    return [*listed, *_float_branches(model), *_left_float(model)]


def _recorder(name: str, seen: dict[str, OperationPrecision]) -> Callable[..., None]:
    def hook(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        precision = _precision_of_call(name, operation, args, kwargs)
        if name not in seen or precision.precision == FLOAT:
            seen[name] = precision

    return hook


def _precision_of_call(
    name: str, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> OperationPrecision:
    given = [*args, *kwargs.values()]
    if operation.kind == 'matmul':
        # a third argument is the scale of a query that is shared by products: it has codes already
        if len(given) > 2:
            return _shared(name, operation, has_codes=given[2] is not None)
        inputs = given[:2]
    else:
        bias = given[1] if operation.kind == 'linear' and len(given) > 1 else None
        inputs = [given[0], getattr(operation, 'bias', None) if bias is None else bias]
    chosen = choose(operation, *inputs)
    _, *refused = explain(operation, *inputs).split('; ')
    reason = '; '.join(text for text in refused if not text.endswith(TRAINING_ONLY))
    backend = 'reference' if chosen is None else chosen.backend
    precision = FLOAT if chosen is None else _bits_of(operation)
    return OperationPrecision(name, operation.kind, precision, backend, reason)


def _shared(name: str, operation: Operation, has_codes: bool) -> OperationPrecision:
    """A product whose query several products share; it is multiplied by torch."""
    if has_codes:
        why = 'the query is shared by several products, which torch multiplies'
        return OperationPrecision(name, operation.kind, _bits_of(operation), 'exact', why)
    why = 'an operand of a product with the same query is float'
    return OperationPrecision(name, operation.kind, FLOAT, 'reference', why)


def _bits_of(operation: Operation) -> str:
    return ' x '.join(_bits(quantizer) for quantizer in operation.quantizers)


def _bits(quantizer: FakeQuantizer) -> str:
    if not quantizer.is_active:
        return FLOAT
    kind = 'log' if quantizer.spec.log_code is not None else 'int'
    return f'{kind}{quantizer.spec.num_bits}'


def _float_branches(model: nn.Module) -> list[OperationPrecision]:
    """Side branches of a compensation, which are float by design."""
    why = 'side branch of a compensation (QwT), float by design'
    return [
        OperationPrecision(f'{name}.compensation', 'branch', FLOAT, '', why, is_wanted_float=True)
        for name, block in compensated_blocks(model).items()
        if block.compensation.is_active
    ]


def _left_float(model: Any) -> list[OperationPrecision]:
    """Operations in the scope that the conversion did not quantize."""
    return [
        OperationPrecision(name, 'float', FLOAT, '', reason, is_wanted_float=reason == TURNED_OFF)
        for name, reason in model.gplq.coverage.kept_float
    ]
