# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Quantized operations as single nodes of a graph that ``torch.export`` captures.

Within ``captured_operations`` the dispatcher gives each layer and matrix product that has an
exported form to a custom torch op, which names the operation; a translation of this op finds the
operation by its name. All others are captured as the tensor functions that compute them on exact
codes in floating point.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops import Operation, register_backend, unregister_backend
from ...ops.backends import exact

BACKEND = 'export'
LONGEST = 8192
"""Most tokens that an attention with dynamic size is exported for."""

_OPERATIONS: ContextVar[Mapping[str, Any]] = ContextVar('operations being exported')


@torch.library.custom_op('gplq_mm::layer', mutates_args=())
def layer(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """Output of a quantized layer of the model that is being exported.

    Args:
        x: Input of the layer, real values.
        bias: ``(channels,)``, or None.
        name: Name of the layer in the model.
    """
    return exact.linear(_OPERATIONS.get()[name], x, bias)


@layer.register_fake
def _(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    operation = _OPERATIONS.get()[name]
    return operation.product(x, x.new_empty(operation.weight.shape), None)


@torch.library.custom_op('gplq_mm::product', mutates_args=())
def product(lhs: Tensor, rhs: Tensor, name: str) -> Tensor:
    """A quantized product of two activations of the model that is being exported.

    Args:
        lhs: ``(..., N, K)``, real values.
        rhs: ``(..., K, M)``, real values.
        name: Name of the product in the model.
    """
    return exact.matmul(_OPERATIONS.get()[name], lhs, rhs)


@product.register_fake
def _(lhs: Tensor, rhs: Tensor, name: str) -> Tensor:
    return _OPERATIONS.get()[name].contract(lhs, rhs)


@torch.library.custom_op('gplq_mm::shared_product', mutates_args=())
def shared_product(codes: Tensor, rhs: Tensor, scale: Tensor, name: str) -> Tensor:
    """A product of a query that other products share.

    Args:
        codes: Centred codes of the query, ``(..., N, K)``, float32.
        rhs: Right operand of the product, real values.
        scale: Of the codes, broadcasts over the product.
        name: Name of the product in the model.
    """
    operation = _OPERATIONS.get()[name]
    right, rhs_scale = operation.rhs_quantizer.codes(rhs)
    return operation.total(codes, right) * (scale * rhs_scale)


@shared_product.register_fake
def _(codes: Tensor, rhs: Tensor, scale: Tensor, name: str) -> Tensor:
    return _OPERATIONS.get()[name].contract(codes, rhs)


def depth_of(operation: Any, x: Tensor) -> int:
    """Number of products in a sum; ``LONGEST`` where the shape of ``x`` depends on the image."""
    if operation.kind != 'matmul':
        return operation.product_depth()
    return x.shape[-1] if isinstance(x.shape[-1], int) else LONGEST


@contextmanager
def captured_operations(
    known: Mapping[str, Operation], refusal: Callable[[str, int], str]
) -> Iterator[None]:
    """Within this context the model's operations call the custom ops, without gradients.

    Args:
        known: The model's operations by name.
        refusal: ``refusal(name, depth)`` is the reason why an operation whose sums have ``depth``
            products has no exported form, or empty. An operation that is refused is captured as
            float products of its codes. It must read no tensor, which has no values then.
    """
    names = {id(operation): name for name, operation in known.items()}

    def compute(
        custom_op: Callable[..., Tensor],
        on_codes: Callable[..., Tensor],
        operation: Operation,
        x: Tensor,
        *rest: Any,
    ) -> Tensor:
        name = names.get(id(operation))
        if name is None or refusal(name, depth_of(operation, x)):
            return on_codes(operation, x, *rest)
        return custom_op(x, *rest, name)

    def compute_shared(operation: Any, codes: Tensor, rhs: Tensor, scale: Tensor) -> Tensor:
        name = names.get(id(operation.product))
        if name is None or refusal(name, depth_of(operation.product, codes)):
            return operation.reference(codes, rhs, scale)
        return shared_product(codes, rhs, scale, name)

    for kinds, custom_op, on_codes in (
        (['linear', 'conv'], layer, exact.linear),
        (['matmul'], product, exact.matmul),
    ):
        computed = partial(compute, custom_op, on_codes)
        register_backend(BACKEND, 'inference', kinds, exact.refusal, computed)
    shared = exact.shared_query
    register_backend(BACKEND, 'inference', ['shared_query'], exact.refusal, shared)
    register_backend(BACKEND, 'inference', ['shared_product'], exact.refusal, compute_shared)
    token = _OPERATIONS.set(known)
    try:
        with torch.no_grad():
            yield
    finally:
        _OPERATIONS.reset(token)
        unregister_backend(BACKEND)
