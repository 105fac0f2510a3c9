# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Charts as Vega-Lite specifications: plain data that the page's script draws as SVG.

Axes have the colour of the surrounding text, so that a chart follows the page's light or dark
colours, and the width of the element that holds it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

COLORS = ('#3182ce', '#dd7a1f', '#2f9e73', '#b35cc9', '#c39a1c', '#d34c5c', '#5f8fa3')
"""Readable on white and on black."""
CONFIG = {
    'background': None,
    'font': 'system-ui, sans-serif',
    'view': {'stroke': None},
    'axis': {
        'domainColor': 'currentColor',
        'domainOpacity': 0.5,
        'gridColor': 'currentColor',
        'gridOpacity': 0.1,
        'labelColor': 'currentColor',
        'labelFontSize': 11,
        'tickColor': 'currentColor',
        'tickOpacity': 0.5,
        'titleColor': 'currentColor',
        'titleFontSize': 11,
        'titleFontWeight': 'normal',
    },
    'legend': {
        'labelColor': 'currentColor',
        'labelFontSize': 12,
        'labelLimit': 240,
        'orient': 'top',
        'symbolStrokeWidth': 2,
        'title': None,
    },
    'range': {'category': list(COLORS)},
    'mark': {'color': COLORS[0]},
}
Spec = dict[str, Any]
Row = Mapping[str, Any]
_AUTOSIZE = {'type': 'fit-x', 'contains': 'padding'}
_COUNT = {'field': 'x', 'type': 'quantitative', 'axis': {'format': 'd', 'tickMinStep': 1}}
"""An axis of whole numbers: iterations, layers."""
# the end of a name says more than its beginning
_END_OF_NAME = "length(datum.label) > 32 ? '…' + slice(datum.label, -31) : datum.label"


def _chart(rows: Sequence[Row], height: int, **parts: Any) -> Spec:
    """A chart as wide as its element."""
    return {
        'data': {'values': list(rows)},
        'width': 'container',
        'height': height,
        'autosize': _AUTOSIZE,
        **parts,
    }


def _tooltip(fields: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the pointer shows: field and its title; numbers with four digits."""
    return [
        {'field': field, 'title': title}
        if field in _WORDS
        else {'field': field, 'title': title, 'type': 'quantitative', 'format': '.4~g'}
        for field, title in fields.items()
    ]


_WORDS = {'name', 'series', 'operand'}


def line_chart(
    rows: Sequence[Row],
    x: str = 'iteration',
    y: str = 'value',
    height: int = 150,
    log: bool = False,
    points: bool = False,
    colors: Mapping[str, str] | None = None,
) -> Spec:
    """A line for each ``series``; rows may lack it, then there is one line.

    Args:
        rows: ``{'x', 'y'}``, with ``series`` and ``name`` where there are any.
        x: Title of the horizontal axis.
        y: Of the vertical one.
        height: Pixels.
        log: Whether the vertical axis is logarithmic.
        points: Whether each row has a dot, which is easier to hit with the pointer.
        colors: Colour by series, if the page has a legend for several charts.
    """
    several = any('series' in row for row in rows)
    shown = {'name': 'name'} if any('name' in row for row in rows) else {'x': x}
    color: Spec = {'field': 'series', 'type': 'nominal', 'sort': None}
    if colors:
        range_of = {'domain': list(colors), 'range': list(colors.values())}
        color |= {'scale': range_of, 'legend': None}
    fields = {**shown, **({'series': 'series'} if several else {}), 'y': y or 'value'}
    scale = {'type': 'log'} if log else {'zero': False}
    return _chart(
        rows,
        height,
        mark={'type': 'line', 'point': {'size': 45, 'filled': True} if points else False},
        encoding={
            'x': {**_COUNT, 'title': x, 'scale': {'nice': False}},
            'y': {
                'field': 'y',
                'type': 'quantitative',
                'title': y or None,
                'scale': scale,
                'axis': {'format': '.4~g', 'tickCount': 5},
            },
            'tooltip': _tooltip(fields),
            **({'color': color} if several else {}),
        },
    )


def bits_chart(rows: Sequence[Row], height: int = 130) -> Spec:
    """Bits of operands in model order.

    Args:
        rows: ``{'x', 'y', 'series', 'name'}``; ``series`` is the kind of operand.
        height: Pixels.
    """
    return _chart(
        rows,
        height,
        mark={'type': 'point', 'size': 60, 'strokeWidth': 1.6, 'opacity': 1},
        encoding={
            'x': {**_COUNT, 'title': 'operation, in model order', 'scale': {'nice': False}},
            'y': {
                'field': 'y',
                'type': 'quantitative',
                'title': 'bits',
                'scale': {'domain': [0, 8.5]},
                'axis': {'values': [2, 3, 4, 6, 8]},
            },
            'color': {'field': 'series', 'type': 'nominal', 'sort': None},
            'shape': {'field': 'series', 'type': 'nominal', 'sort': None},
            'tooltip': _tooltip({'name': 'name', 'series': 'operand', 'y': 'bits'}),
        },
    )


def grid_histogram(histogram: Row, height: int = 120) -> Spec:
    """Distribution of a weight in steps of its grid, the grid's values as lines.

    Args:
        histogram: Result of ``weight_histogram``.
        height: Pixels.
    """
    counts = histogram['counts']
    low, high = histogram['low'], histogram['high']
    width, total = (high - low) / len(counts), max(sum(counts), 1)
    bars = [
        {'x': low + i * width, 'x2': low + (i + 1) * width, 'y': 100 * count / total}
        for i, count in enumerate(counts)
    ]
    lines = [{'x': code} for code in range(histogram['qmin'], histogram['qmax'] + 1)]
    axis = {'field': 'x', 'type': 'quantitative', 'scale': {'domain': [low, high], 'nice': False}}
    return {
        'width': 'container',
        'height': height,
        'autosize': _AUTOSIZE,
        'layer': [
            {
                'data': {'values': bars},
                'mark': {'type': 'rect', 'color': COLORS[0], 'opacity': 0.85},
                'encoding': {
                    'x': {**axis, 'title': 'weight, in steps of the grid'},
                    'x2': {'field': 'x2'},
                    'y': {
                        'field': 'y',
                        'type': 'quantitative',
                        'title': '% of weights',
                        'axis': {'tickCount': 3, 'grid': False},
                    },
                    'y2': {'datum': 0},
                    'tooltip': _tooltip({'x': 'from', 'x2': 'to', 'y': '%'}),
                },
            },
            {
                'data': {'values': lines},
                'mark': {'type': 'rule', 'color': COLORS[1], 'opacity': 0.75, 'size': 1},
                'encoding': {'x': axis},
            },
        ],
    }


def moves_chart(rows: Sequence[Row]) -> Spec:
    """Changes of scales in percent.

    Args:
        rows: Result of ``scale_changes``, names shortened.
    """
    values = [{**row, 'percent': 100 * (row['after'] / row['before'] - 1)} for row in rows]
    fields = {
        'name': 'quantizer',
        'percent': 'change in %',
        'before': 'before',
        'after': 'after',
        'octaves': 'octaves',
    }
    encoding: Spec = {
        'x': {'field': 'percent', 'type': 'quantitative', 'title': 'change in %'},
        'y': {
            'field': 'name',
            'type': 'nominal',
            'sort': None,
            'title': None,
            'axis': {'labelExpr': _END_OF_NAME, 'labelLimit': 210, 'grid': True},
        },
        'tooltip': _tooltip(fields),
    }
    mark = {'type': 'bar', 'height': 9, 'cornerRadiusEnd': 2}
    return _chart(values, 18 * len(rows), mark=mark, encoding=encoding)
