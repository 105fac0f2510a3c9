# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Operation: interface of a computation with quantized operands.

Cost, sensitivity, PTQ and export use this interface and do not depend on the classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..quantizers import FakeQuantizer
from .engine import EngineUser


@dataclass(frozen=True)
class Operand:
    """One input of an operation that is quantized.

    Attributes:
        name: ``input``, ``weight``, ``lhs``, ``rhs``, ... Its quantizer is the operation's
            ``<name>_quantizer``.
        quantizer: Its quantizer.
        weight: The weight; None for an activation.
        suffix: Appended to the operation's name to give the name that rules match: empty for
            a layer, ``.lhs`` or ``.rhs`` for a matrix product.
    """

    name: str
    quantizer: FakeQuantizer
    weight: Tensor | None = None
    suffix: str = ''

    @property
    def kind(self) -> str:
        """``weight`` or ``activation``."""
        return self.quantizer.kind

    @property
    def role(self) -> str:
        """Role of the operand, one of ``recipe.ROLES``."""
        return self.quantizer.role

    @property
    def shape(self) -> torch.Size | None:
        """Shape of a weight; None for an activation, whose shape depends on the call."""
        return None if self.weight is None else self.weight.shape


class Codes(NamedTuple):
    """A tensor as integers.

    Attributes:
        codes: Centred integer codes, or levels of a logarithmic code, float32.
        scale: Broadcasts to the codes; ``codes * scale`` is the tensor on its grid.
    """

    codes: Tensor
    scale: Tensor


class Operation(EngineUser):
    """Base class of computations with quantized operands.

    ``dispatch.compute`` runs an operation with the backend that accepts the call.
    ``reference`` defines the result; every backend gives the same numbers.
    """

    kind: ClassVar[str]
    """``linear``, ``conv``, ``matmul``, ``attention``, ``ffn``, ``shared_query``, or
    ``shared_product``."""

    @property
    def quantizers(self) -> Sequence[FakeQuantizer]:
        """Quantizers of all operands, in the order of ``operands``."""
        return [operand.quantizer for operand in self.operands().values()]

    def operands(self) -> dict[str, Operand]:
        """Quantized operands by name, inputs in the order of the call."""
        raise NotImplementedError

    def codes(self, *inputs: Tensor) -> dict[str, Codes]:
        """Integer codes and scales of the given inputs and of the weight, by operand name.

        Args:
            *inputs: As for ``reference``; without any, only the codes of a layer's weight.

        Raises:
            UncalibratedError: If one of them has no scale yet.
        """
        operands = zip(self.operands().values(), inputs, strict=False)
        return {o.name: Codes(*o.quantizer.codes(x)) for o, x in operands}

    def macs(self, inputs: Sequence[torch.Size], output: torch.Size) -> int:
        """Multiply-accumulates of one call.

        Args:
            inputs: Shapes of the inputs.
            output: Shape of the output.
        """
        raise NotImplementedError

    def reference(self, *inputs: Any) -> Any:
        """The operation on values on their grids; torch's autograd differentiates it."""
        raise NotImplementedError


def operations(model: nn.Module) -> dict[str, Operation]:
    """Layers and matrix products with quantized operands by name, in model order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Operation)}
