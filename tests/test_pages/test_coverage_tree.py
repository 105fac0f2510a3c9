# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The tree of quantized operations."""

from gplq_mm.pages.coverage_tree import coverage_tree
from tests.helpers.reports import LAYERS, LONG_NAME, report_data


def test_every_operation_is_in_the_tree_once() -> None:
    tree = coverage_tree(report_data())
    assert (tree.quantized, tree.floats) == (len(LAYERS), 1)
    layers = tree.children['backbone']
    assert layers.name == 'backbone.layers'
    assert list(layers.children) == ['0', '1', '2']
    leaf = layers.children['0'].children['attn']
    assert (leaf.name, leaf.kind, leaf.bits) == ('attn.qkv', 'linear', 'W4 A4')
    kept = tree.children['neck']
    assert (kept.name, kept.reason) == (LONG_NAME, 'no handler for x.Y')


def test_an_older_report_names_its_layers() -> None:
    data = report_data()
    del data['operands'], data['coverage']['quantized']
    tree = coverage_tree(data)
    assert tree.quantized == len(LAYERS)
    assert next(tree.operations()).bits == 'W4'


def test_an_operation_with_operations_inside_keeps_them() -> None:
    quantized = dict(matmul=['attn'], linear=['attn.qkv'])
    tree = coverage_tree(dict(coverage=dict(quantized=quantized, kept_float=[])))
    assert tree.quantized == 2
    assert tree.children['attn'].kind == 'matmul'
    assert tree.children['attn'].children['qkv'].kind == 'linear'
