# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Nodes: writes the ONNX nodes of one operation, and remembers which operation they belong to."""

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset21
from torch import Tensor

OPSET = 21
"""First version of ONNX's operators with 4-bit integers."""
OPERATION = 'gplq_mm.operation'
"""Key of a node's metadata: the operation that the node belongs to."""
GIVES = f'{OPERATION}.gives'
"""What the node's output is: ``output``, or codes of an operand (``input.codes``)."""
READS = f'{OPERATION}.reads'
"""What the node's first input is: the operand ``input``, ``lhs`` or ``rhs``."""


class Nodes:
    """Writes nodes while ``torch.onnx.export`` translates one operation.

    Args:
        operation: Name of the operation in the model.
    """

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self._operands: list[tuple[str, Any]] = []

    def __call__(self, kind: str, *inputs: Any, **attributes: Any) -> Any:
        """Add a node with one output, and return the output.

        Args:
            kind: Name of the ONNX operator.
            *inputs: Values, or arrays that become constants.
            **attributes: Attributes of the operator.
        """
        values = [self.constant(x) if isinstance(x, np.ndarray | Tensor) else x for x in inputs]
        output = self._marked(getattr(opset21, kind)(*values, **attributes))
        for operand, value in self._operands:
            if inputs and inputs[0] is value:
                output.producer().metadata_props[READS] = operand
        return output

    def reads(self, operand: str, value: Any) -> None:
        """Record in the metadata which nodes have an operand as their first input.

        Args:
            operand: ``input``, ``lhs`` or ``rhs``.
            value: The operand, a value of the graph.
        """
        self._operands.append((operand, value))

    def constant(self, array: np.ndarray | Tensor) -> Any:
        """An array of any shape as a constant of the graph."""
        if isinstance(array, Tensor):
            array = array.detach().cpu().numpy()
        return self._marked(opset21.Constant(value=ir.tensor(np.ascontiguousarray(array))))

    def named(self, value: Any, part: str) -> Any:
        """Record in the metadata that a value is a part of the operation.

        Args:
            value: Output of one of these nodes.
            part: ``output``, or ``codes`` of an operand: ``input.codes``.
        """
        value.producer().metadata_props[GIVES] = part
        return value

    def _marked(self, value: Any) -> Any:
        value.producer().metadata_props[OPERATION] = self.operation
        return value


def float_array(value: Any) -> np.ndarray:
    """Numbers or a tensor as a float32 array of the same shape."""
    if isinstance(value, Tensor):
        return value.detach().to('cpu', torch.float32).numpy()
    return np.asarray(value, np.float32)
