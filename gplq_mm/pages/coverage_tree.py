# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The operations of a model as a tree of module names, with what stays float."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_OPEN_FLOATS = 12
"""Operations left float whose branches are open at once; more of them are a list to unfold."""


@dataclass
class Node:
    """A module.

    Attributes:
        name: Last part of its dotted name; several parts where a module has one child only.
        kind: ``linear``, ``conv`` or ``matmul`` of a quantized operation, else empty.
        bits: Bits of its operands, such as ``W4 A4``.
        reason: Why it stays float; empty if it does not.
        children: By name, in model order.
    """

    name: str
    kind: str = ''
    bits: str = ''
    reason: str = ''
    children: dict[str, 'Node'] = field(default_factory=dict)

    def operations(self) -> Iterator['Node']:
        """All operations below, itself included."""
        if self.kind or self.reason:
            yield self
        for child in self.children.values():
            yield from child.operations()

    @property
    def quantized(self) -> int:
        """Number of quantized operations below."""
        return sum(not node.reason for node in self.operations())

    @property
    def floats(self) -> int:
        """Number of operations below that stay float."""
        return sum(bool(node.reason) for node in self.operations())


def coverage_tree(report: Mapping[str, Any]) -> Node:
    """The tree of a report.

    Args:
        report: Content of the JSON report. Reports of older versions name the layers with a
            weight only.

    Examples:
        >>> kept = [dict(name='body.norm', reason='no handler')]
        >>> coverage = dict(quantized=dict(linear=['body.fc']), kept_float=kept)
        >>> tree = coverage_tree(dict(coverage=coverage))
        >>> tree.quantized, tree.floats, list(tree.children)
        (1, 1, ['body'])
    """
    coverage, bits = report['coverage'], bits_of_modules(report.get('operands', ()))
    kinds = coverage.get('quantized')
    if kinds is None:
        layers = report.get('stage2', {}).get('weights', {}).get('layers', {})
        kinds = {'layer': list(layers)}
        bits = {name: f'W{about["num_bits"]}' for name, about in layers.items()}
    root = Node('model')
    for kind, names in kinds.items():
        for name in names:
            node = _node(root, name)
            node.kind, node.bits = kind, bits.get(name, '')
    for entry in coverage['kept_float']:
        _node(root, entry['name']).reason = entry['reason']
    _join_single_children(root)
    return root


def bits_of_modules(operands: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Bits of the operands of each operation, in one word.

    Examples:
        >>> operand = dict(module='fc', kind='weight', bits=4)
        >>> bits_of_modules([operand, dict(operand, kind='activation', bits=8)])
        {'fc': 'W4 A8'}
    """
    found: dict[str, list[str]] = {}
    for operand in operands:
        letter = operand['kind'][0].upper()
        found.setdefault(operand['module'], []).append(f'{letter}{operand["bits"]}')
    return {module: ' '.join(words) for module, words in found.items()}


def _node(root: Node, name: str) -> Node:
    for part in name.split('.'):
        root = root.children.setdefault(part, Node(part))
    return root


def _join_single_children(node: Node) -> None:
    """Write ``a.b`` for a module whose only child is another module."""
    for key, child in list(node.children.items()):
        while len(child.children) == 1 and not (child.kind or child.reason):
            only = next(iter(child.children.values()))
            only.name = f'{child.name}.{only.name}'
            child = only
        node.children[key] = child
        _join_single_children(child)
