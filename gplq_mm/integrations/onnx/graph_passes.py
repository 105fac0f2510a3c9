# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Last changes to an exported graph: names of operations, weights of four bits, no debug texts."""

from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import DeduplicateInitializersPass

from .nodes import GIVES, OPERATION, READS

PRODUCTS = ('MatMulInteger', 'ConvInteger')


def finish(model: Any) -> None:
    """Apply all passes to an ``onnx_ir.Model`` in place."""
    name_nodes(model.graph)
    store_small_weights(model.graph)
    drop_debug_texts(model)
    DeduplicateInitializersPass(size_limit=1 << 20)(model)


def name_nodes(graph: Any) -> None:
    """Name the nodes of an operation after it: ``blocks.0.mlp.0/MatMulInteger``."""
    used: dict[str, int] = {}
    for node in graph:
        operation = node.metadata_props.get(OPERATION)
        if operation is None:
            continue
        name = f'{operation}/{node.op_type}'
        used[name] = used.get(name, 0) + 1
        node.name = name if used[name] == 1 else f'{name}_{used[name]}'
        output = node.outputs[0]
        if GIVES in node.metadata_props and not output.is_graph_output():
            output.name = f'{operation}/{node.metadata_props[GIVES]}'


def store_small_weights(graph: Any) -> None:
    """Store int8 weights from -8 to 7 in 4 bits, followed by a Cast to int8.

    Runtimes fold the Cast when they load the file; done before the exporter's own folding, it
    would have no effect.
    """
    for node in list(graph):
        if node.op_type not in PRODUCTS or OPERATION not in node.metadata_props:
            continue
        weight = node.inputs[1]
        if weight is None or weight.const_value is None or weight.dtype != ir.DataType.INT8:
            continue
        codes = weight.const_value.numpy()
        operation = node.metadata_props[OPERATION]
        weight.name = f'{operation}/weight'
        if not codes.size or codes.min() < -8 or codes.max() > 7:
            continue
        small = ir.val(f'{operation}/weight_int4', type=ir.TensorType(ir.DataType.INT4))
        small.shape = weight.shape
        small.const_value = ir.tensor(codes, dtype=ir.DataType.INT4, name=small.name)
        graph.register_initializer(small)
        cast = ir.node('Cast', [small], {'to': ir.DataType.INT8}, name=f'{operation}/weight_Cast')
        cast.metadata_props[OPERATION] = operation
        graph.insert_before(node, cast)
        node.replace_input_with(1, cast.outputs[0])
        if not weight.uses():
            del graph.initializers[weight.name]


def drop_debug_texts(model: Any) -> None:
    """Remove the exporter's stack traces, which hold paths of the machine and most of the bytes."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        kept = {k: v for k, v in node.metadata_props.items() if k in (OPERATION, GIVES, READS)}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
