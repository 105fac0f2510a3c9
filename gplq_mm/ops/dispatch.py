# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Choice of the backend that computes an operation, for each call.

A backend computes some kinds of operations, in training or in inference. It registers itself
and gives a reason for each call that it refuses. A call that every backend refuses is computed
by the operation's own ``reference``.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch

from ..quantizers import FakeQuantizer
from .operation import Operation

Phase = Literal['training', 'inference', 'integer']


class Implementation(NamedTuple):
    """How a backend computes one kind of operation.

    Attributes:
        backend: Name of the backend.
        phase: ``training`` (with gradients), ``inference`` (without), or ``integer``: inference of
            an engine with ``inference='integer'``.
        refusal: ``refusal(operation, *inputs)`` is the reason to refuse a call, or empty.
        compute: ``compute(operation, *inputs)`` returns the result of ``operation.reference``.
    """

    backend: str
    phase: Phase
    refusal: Callable[..., str]
    compute: Callable[..., Any]


_IMPLEMENTATIONS: dict[str, list[Implementation]] = {}


def register_backend(
    backend: str,
    phase: Phase,
    kinds: Iterable[str],
    refusal: Callable[..., str],
    compute: Callable[..., Any],
) -> None:
    """Add a backend for some kinds of operations; it is asked before those registered earlier.

    Args:
        backend: Name of the backend.
        phase: See ``Implementation``.
        kinds: Kinds of operations, see ``Operation.kind``.
        refusal: See ``Implementation``.
        compute: See ``Implementation``.

    Raises:
        ValueError: If a backend of this name computes one of the kinds already.
    """
    kinds = list(kinds)
    for kind in kinds:
        if any(known.backend == backend for known in _IMPLEMENTATIONS.get(kind, ())):
            raise ValueError(
                f'a backend {backend!r} computes {kind} already; choose another name, or call '
                f'unregister_backend({backend!r}) first'
            )
    for kind in kinds:
        added = Implementation(backend, phase, refusal, compute)
        _IMPLEMENTATIONS.setdefault(kind, []).insert(0, added)


def unregister_backend(backend: str) -> None:
    """Remove a backend from all kinds of operations."""
    for kind, known in _IMPLEMENTATIONS.items():
        _IMPLEMENTATIONS[kind] = [i for i in known if i.backend != backend]


def compute(operation: Operation, *inputs: Any) -> Any:
    """Compute an operation with the first backend that accepts the call.

    Args:
        operation: The operation.
        *inputs: Inputs of its ``reference``.
    """
    chosen = choose(operation, *inputs)
    if chosen is None:
        return operation.reference(*inputs)
    return chosen.compute(operation, *inputs)


def choose(operation: Operation, *inputs: Any) -> Implementation | None:
    """The first backend that accepts the call; None for the operation's reference."""
    for implementation in _IMPLEMENTATIONS.get(operation.kind, ()):
        if not _refusal(implementation, operation, inputs):
            return implementation
    return None


def explain(operation: Operation, *inputs: Any) -> str:
    """The backend that ``compute`` chooses for a call, and why the others refuse it.

    Args:
        operation: The operation.
        *inputs: Inputs of the call.
    """
    known = _IMPLEMENTATIONS.get(operation.kind, ())
    reasons = [(i.backend, _refusal(i, operation, inputs)) for i in known]
    chosen = next((backend for backend, reason in reasons if not reason), 'reference')
    refused = [f'not {backend}: {reason}' for backend, reason in reasons if reason]
    return '; '.join([f'{operation.kind}: {chosen}', *refused])


def _refusal(implementation: Implementation, operation: Operation, inputs: Sequence[Any]) -> str:
    if implementation.phase != 'training':
        if torch.is_grad_enabled():
            return 'gradients are enabled'
        if implementation.phase == 'integer' and operation.engine.inference != 'integer':
            return "engine.inference='simulated'"
    elif not torch.is_grad_enabled():
        return 'gradients are disabled'
    elif operation.engine.type == 'reference':
        return "engine='reference'"
    elif torch.compiler.is_compiling():  # its partitioner decides what the backward pass keeps
        return 'torch.compile traces the reference'
    return implementation.refusal(operation, *inputs)


def not_quantized(quantizers: Iterable[FakeQuantizer]) -> str:
    """Reason to refuse: names the first operand that is not quantized; empty if all are."""
    for quantizer in quantizers:
        if not quantizer.is_active:
            return f'{quantizer.name or "an operand"} is not quantized now'
    return ''
