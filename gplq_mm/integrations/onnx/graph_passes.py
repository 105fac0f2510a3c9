# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Last changes to an exported graph: names of operations, weights of four bits, no debug texts."""

import ast
import json
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import DeduplicateInitializersPass
from torch import nn

from ...convert.handlers import TURNED_OFF
from ...ops import operations
from ...ptq.corrections.side_branch import compensated_blocks
from .nodes import GIVES, OPERATION, READS

PRODUCTS = ('MatMulInteger', 'ConvInteger')
FLOAT_PRODUCTS = ('Conv', 'ConvTranspose', 'Einsum', 'Gemm', 'MatMul')
OUTSIDE = 'gplq_mm.outside'
"""Key of a file's metadata: module -> why its float products are no operations of the scope."""
MODULES = 'pkg.torch.onnx.name_scopes'
"""Key under which torch's exporter records the modules that a node is in, and the node itself."""
OUTSIDE_THE_SCOPE = 'outside the scope'
SIDE_BRANCH = 'side branch of a compensation (QwT)'


def finish(model: Any, exported: nn.Module, owner: nn.Module) -> None:
    """Apply all passes to an ``onnx_ir.Model`` in place.

    Args:
        model: The graph.
        exported: Module that torch's exporter captured.
        owner: Model whose names of operations the file has.
    """
    name_nodes(model.graph)
    outside = name_float_products(model.graph, exported, owner)
    store_small_weights(model.graph)
    drop_debug_texts(model)
    model.metadata_props[OUTSIDE] = json.dumps(outside)
    DeduplicateInitializersPass(size_limit=1 << 20)(model)


def name_nodes(graph: Any) -> None:
    """Name the nodes of an operation after it: ``blocks.0.mlp.0/MatMulInteger``."""
    used: dict[str, int] = {}
    for node in graph:
        operation = node.metadata_props.get(OPERATION)
        if operation is None:
            continue
        node.name = _numbered(f'{operation}/{node.op_type}', used)
        output = node.outputs[0]
        if GIVES in node.metadata_props and not output.is_graph_output():
            output.name = _numbered(f'{operation}/{node.metadata_props[GIVES]}', used)


def _numbered(name: str, used: dict[str, int]) -> str:
    """The name, with a number from its second use on, as in a layer that is called twice."""
    used[name] = used.get(name, 0) + 1
    return name if used[name] == 1 else f'{name}_{used[name]}'


def name_float_products(graph: Any, exported: nn.Module, owner: nn.Module) -> dict[str, str]:
    """Name float products after the module that computes them: ``neck.convs.0/Conv``.

    Args:
        graph: Graph with the exporter's metadata.
        exported: See ``finish``.
        owner: See ``finish``.

    Returns:
        Module -> reason, for modules whose float products are no operations of the recipe's scope.
        A product whose module is unknown keeps the exporter's name, and counts as one of the scope.
    """
    names = {id(module): name for name, module in owner.named_modules()}
    places = {n: names[id(m)] for n, m in exported.named_modules() if id(m) in names}
    known, reasons = set(operations(owner)), _reasons(owner)
    outside: dict[str, str] = {}
    used: dict[str, int] = {}
    for node in graph:
        if node.op_type not in FLOAT_PRODUCTS or OPERATION in node.metadata_props:
            continue
        path = ast.literal_eval(node.metadata_props.get(MODULES, '[]'))
        modules = [places[name] for name in path[:-1] if name in places]
        if not modules:
            continue
        name = modules[-1] or type(owner).__name__
        node.name = _numbered(f'{name}/{node.op_type}', used)
        if not node.outputs[0].is_graph_output():
            node.outputs[0].name = f'{name}/{node.outputs[0].name}'
        reason = next((reasons[m] for m in reversed(modules) if m in reasons), OUTSIDE_THE_SCOPE)
        if reason and not known.intersection(modules):
            outside[name] = reason
    return outside


def _reasons(owner: Any) -> Mapping[str, str]:
    """Modules that are float by design, with the reason; empty for those that should not be."""
    kept = owner.gplq.coverage.kept_float if hasattr(owner, 'gplq') else ()
    reasons = {name: reason if reason == TURNED_OFF else '' for name, reason in kept}
    branches = {f'{name}.compensation': SIDE_BRANCH for name in compensated_blocks(owner)}
    return {**reasons, **branches}


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
