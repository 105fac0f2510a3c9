# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Precision in which onnxruntime executes each operation of a file."""

import tempfile
from pathlib import Path

import onnx
from onnx import TensorProto

from .graph_passes import OUTSIDE
from .onnx_model import OnnxModel
from .packages import Precision, outside_of, precision_of

PRODUCTS = {
    'ConvInteger': (0, 1),
    'MatMulInteger': (0, 1),
    'MatMulIntegerToFloat': (0, 1),
    'DynamicQuantizeMatMul': (0, 1),
    'QLinearConv': (0, 3),
    'QLinearMatMul': (0, 3),
    'QGemm': (0, 3),
    'Conv': (0, 1),
    'ConvTranspose': (0, 1),
    'FusedConv': (0, 1),
    'FusedGemm': (0, 1),
    'FusedMatMul': (0, 1),
    'Gemm': (0, 1),
    'MatMul': (0, 1),
}
"""Operators that multiply matrices -> inputs that are multiplied."""
SAME_TYPE = ('Gather', 'Reshape', 'Transpose', 'Squeeze', 'Unsqueeze')
"""Operators whose output has the type of their first input."""
_UNKNOWN = 'float32'


def precisions(path: str | Path) -> list[Precision]:
    """Matrix products of the graph that onnxruntime executes after its optimizations.

    Args:
        path: ``.onnx`` file.

    Returns:
        Products in the order of the graph; those that an exported operation consists of have its
        name.

    Raises:
        ModuleNotFoundError: If onnxruntime is missing.
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no ONNX model.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / 'optimized.onnx'
        OnnxModel(path, optimized=optimized)
        graph = onnx.load(optimized, load_external_data=False).graph
    about = onnx.load(path, load_external_data=False).metadata_props
    outside = outside_of(next((p.value for p in about if p.key == OUTSIDE), ''))
    types, found = _types(graph), []
    for node in graph.node:
        if node.op_type not in PRODUCTS:
            continue
        names = (node.input[i] for i in PRODUCTS[node.op_type])
        multiplied = ' x '.join(types.get(name, _UNKNOWN) for name in names)
        found.append(precision_of([node.name, *node.output], node.op_type, multiplied, outside))
    return found


def _types(graph: onnx.GraphProto) -> dict[str, str]:
    """Types of constants, of declared values and of outputs of quantizing nodes; others float."""
    types = {x.name: _name(x.data_type) for x in graph.initializer}
    for info in (*graph.input, *graph.value_info, *graph.output):
        types[info.name] = _name(info.type.tensor_type.elem_type)
    for node in graph.node:
        if node.op_type == 'QuantizeLinear' and len(node.input) > 2:
            types[node.output[0]] = types.get(node.input[2], 'uint8')
        elif node.op_type == 'DynamicQuantizeLinear':
            types[node.output[0]] = 'uint8'
        elif node.op_type == 'Cast':
            to = next(a.i for a in node.attribute if a.name == 'to')
            types[node.output[0]] = _name(to)
        elif node.op_type in SAME_TYPE and node.input[0] in types:
            types[node.output[0]] = types[node.input[0]]
    return types


def _name(data_type: int) -> str:
    return {TensorProto.FLOAT: 'float32', TensorProto.DOUBLE: 'float64'}.get(
        data_type, TensorProto.DataType.Name(data_type).lower()
    )
