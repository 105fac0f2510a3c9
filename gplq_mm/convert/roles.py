# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Roles: kinds of operands, which a parent module sets for its children.

Roles are set before the conversion, for classes and their subclasses, and do not change any
computation: a user's head gets the roles of the head that it extends.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..compat.torch import ConvNd
from ..ops import swap_class
from .handlers import Context, register_handler

RoleGiver = Callable[[Any, str, Context], None]
ROLE_GIVERS: list[tuple[tuple[type[nn.Module], ...], RoleGiver]] = []
_AFTER = ((nn.GELU, 'post_gelu'), (nn.ReLU, 'post_relu'), (nn.ReLU6, 'post_relu'))


def register_roles(*types: type[nn.Module]) -> Callable[[RoleGiver], RoleGiver]:
    """Function decorator: the function sets the roles of children of these classes."""

    def add(giver: RoleGiver) -> RoleGiver:
        ROLE_GIVERS.append((types, giver))
        return giver

    return add


def give_roles(module: nn.Module, name: str, context: Context) -> None:
    """Run every role function registered for a class of the module."""
    for types, giver in ROLE_GIVERS:
        if isinstance(module, types):
            giver(module, name, context)


def child_name(name: str, child: str) -> str:
    """Dotted name of a child; the root's name is empty.

    Examples:
        >>> child_name('a', 'b'), child_name('', 'b')
        ('a.b', 'b')
    """
    return f'{name}.{child}' if name else child


def set_ffn_roles(module: nn.Module, name: str, context: Context) -> None:
    """Set ``post_gelu`` and ``post_relu`` for the layers after an activation function.

    Args:
        module: Module whose children run in the order of their registration.
        name: Its dotted name.
        context: The current conversion.
    """
    role = None
    for child, layer in module.named_modules(remove_duplicate=False):
        if is_layer(layer):
            if role is not None:
                context.set_role(child_name(name, child), role)
            role = None
        role = next((after for cls, after in _AFTER if isinstance(layer, cls)), role)


def register_ffn(float_class: type[nn.Module], quantized: type[nn.Module]) -> None:
    """Register a feed-forward class whose layers are its direct children.

    Args:
        float_class: Its layers after the activation function get ``post_gelu`` or ``post_relu``.
        quantized: Subclass that can run them as one operation, see ``MlpFeedForward``.
    """

    @register_handler(float_class)
    def convert_ffn(module: Any, name: str, context: Context) -> None:
        swap_class(module, quantized)

    register_roles(float_class)(set_ffn_roles)


def set_predictor_roles(module: nn.Module, name: str, context: Context, pattern: str) -> None:
    """Set ``predictor`` for the last layers of a head.

    Args:
        module: The head.
        name: Its dotted name.
        context: The current conversion.
        pattern: Regular expression for the names of its children that predict.
    """
    for child, layer in module.named_children():
        if re.search(pattern, child):
            for last in _last_layers(layer, child_name(name, child)):
                context.set_role(last, 'predictor')


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a Linear or convolution."""
    return isinstance(module, nn.Linear | ConvNd)


def _last_layers(module: nn.Module, name: str) -> Iterator[str]:
    """Names of the last layer of a branch, or of each branch of a list."""
    if is_layer(module):
        yield name
    children = list(module.named_children())
    if not isinstance(module, nn.ModuleList):
        children = [c for c in children if any(map(is_layer, c[1].modules()))][-1:]
    for child, layer in children:
        yield from _last_layers(layer, child_name(name, child))
