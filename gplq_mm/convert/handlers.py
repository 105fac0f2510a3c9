# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Handlers: functions that turn a float module into a quantized one, by class.

A handler is a function ``handler(module, name, context)`` registered for an exact
class. It may attach quantizers, swap the module's class, or set roles of its
children. Adapters register the handlers of other libraries' classes.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from ..ops import QuantConv2d, QuantConvTranspose2d, QuantLinear, QuantMatMul, swap_class
from ..quantizers import FakeQuantizer, PerChannel, QuantSpec, build_observer
from ..recipe import OperandSettings, RuleBook, WeightSettings, spec_from_settings


class Context(Protocol):
    """Interface of a conversion for handlers: roles, quantizers and the coverage report."""

    def role(self, name: str, default: str = 'input') -> str:
        """Role that a parent module has set for a module, or the default."""

    def set_role(self, name: str, role: str) -> None:
        """Set the role of a (child) module that is converted later."""

    def activation(
        self,
        name: str,
        role: str,
        axis: int | None,
        size: int | None,
        row_axis: int | None = None,
    ) -> FakeQuantizer | None:
        """Quantizer of an activation operand, or None if the rules turn it off.

        ``row_axis`` is the summed axis of a matrix product's operand, for ``per_row`` scales.
        """

    def weight(self, name: str, role: str, axis: int, size: int) -> FakeQuantizer | None:
        """Quantizer of a weight, or None if the rules turn it off."""

    def keep_float(self, name: str, reason: str) -> None:
        """Report that an operation inside the scope stays float."""

    def skip(self, name: str, reason: str) -> None:
        """Keep a module and its children float on purpose: no error with ``strict``."""

    def count(self, kind: str, name: str) -> None:
        """Report a quantized operation."""


Handler = Callable[[Any, str, Context], None]
HANDLERS: dict[type[nn.Module], Handler] = {}
TURNED_OFF = 'turned off by a rule'
"""Reason in the report for operations that the recipe keeps float."""


def register_handler(*types: type[nn.Module]) -> Callable[[Handler], Handler]:
    """Function decorator: use the function for these exact module classes."""

    def add(handler: Handler) -> Handler:
        for cls in types:
            HANDLERS[cls] = handler
        return handler

    return add


def find_handler(module: nn.Module) -> Handler | None:
    """Handler of a module's exact class; a subclass may compute another function."""
    return HANDLERS.get(type(module))


def register_layer(float_cls: type[nn.Module], quant_cls: type[nn.Module]) -> None:
    """Convert ``float_cls`` (a Linear, Conv2d or ConvTranspose2d) into ``quant_cls``."""

    def handler(module: Any, name: str, context: Context) -> None:
        convert_layer(module, name, context, quant_cls)

    HANDLERS[float_cls] = handler


def convert_layer(module: Any, name: str, context: Context, quant_cls: type[nn.Module]) -> None:
    """Attach quantizers to a Linear or convolution and change its class to ``quant_cls``.

    Args:
        module: The float layer.
        name: Its dotted name.
        context: The current conversion.
        quant_cls: A ``QuantizedLayer`` that extends the layer's class.
    """
    is_linear = isinstance(module, nn.Linear)
    default = 'image' if not is_linear and module.in_channels == 3 else 'input'
    role = context.role(name, default)
    in_size = module.in_features if is_linear else module.in_channels
    weight_axis = quant_cls.weight_axis  # type: ignore[attr-defined]
    channel_axis = quant_cls.channel_axis  # type: ignore[attr-defined]
    activation = context.activation(name, role, channel_axis, in_size)
    weight = context.weight(name, role, weight_axis, module.weight.shape[weight_axis])
    if activation is None or weight is None:
        context.keep_float(name, TURNED_OFF)
        return
    swap_class(module, quant_cls)
    module.attach_quantizers(activation, weight)
    context.count(module.kind, name)


register_layer(nn.Linear, QuantLinear)
register_layer(nn.Conv2d, QuantConv2d)
register_layer(nn.ConvTranspose2d, QuantConvTranspose2d)


def make_matmul(
    name: str, context: Context, roles: tuple[str, str], heads: int | None
) -> QuantMatMul | None:
    """QuantMatMul for two activation operands of an attention module.

    Args:
        name: Dotted name that the matmul will have.
        context: The current conversion.
        roles: Roles of the left and right operand.
        heads: Number of heads (axis 1 of ``(B, heads, N, D)``) for scales per head; None for
            operands without such an axis, which are then per-tensor.

    Returns:
        The module, or None if a rule turns one operand off.
    """
    axis = None if heads is None else 1
    lhs = context.activation(f'{name}.lhs', roles[0], axis, heads, row_axis=-1)
    rhs = context.activation(f'{name}.rhs', roles[1], axis, heads, row_axis=-2)
    if lhs is None or rhs is None:
        context.keep_float(name, TURNED_OFF)
        return None
    context.count(QuantMatMul.kind, name)
    return QuantMatMul(lhs, rhs)


def build_quantizer(
    book: RuleBook,
    base: OperandSettings,
    kind: str,
    name: str,
    role: str,
    axis: int | None,
    size: int | None,
    row_axis: int | None = None,
) -> FakeQuantizer | None:
    """Quantizer of one operand by the rules, or None if they turn it off.

    Raises:
        ValueError: If the settings do not fit the operand.
    """
    settings = book.resolve(base, kind, name, role)
    if not settings.enabled:
        return None
    if isinstance(settings, WeightSettings):
        settings.check_trained(name)
    try:
        spec = spec_from_settings(settings, axis, row_axis)
    except ValueError as error:
        raise ValueError(f'{name}: {error}') from None
    _check_observer(spec, name)
    per_channel = isinstance(spec.granularity, PerChannel)
    quantizer = FakeQuantizer(spec, size if per_channel else None, kind)  # type: ignore[arg-type]
    quantizer.role = role
    return quantizer


def _check_observer(spec: QuantSpec, name: str) -> None:
    """Refuse unknown arguments of the observer here, before data is loaded."""
    try:
        build_observer(spec)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f'{name}: observer_args={spec.observer_args} do not fit observer={spec.observer!r} '
            f'({error})'
        ) from None
