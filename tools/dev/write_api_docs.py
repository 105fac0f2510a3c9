# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Write docs/api.md from the docstrings of the functions in `gplq_mm`; nothing is imported.

Example:
    python tools/dev/write_api_docs.py
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / 'docs' / 'api.md'
ORDER = (
    'quantize',
    'calibrate',
    'distill',
    'stage1_optimizer',
    'train_stage1',
    'quantize_weights',
    'save',
    'load',
)
HEADER = """\
# Functions for torch alone

Written by `tools/dev/write_api_docs.py` from the docstrings; a test compares it with them.

`import gplq_mm` imports no library; the functions need torch, and a model of timm, torchvision,
mmpretrain or mmdet the library that it comes from. They work in this order, each in place:

```python
import copy, gplq_mm

teacher = copy.deepcopy(model)  # the float model
gplq_mm.quantize(model, 'w4a4')  # quantizers, nothing calibrated
gplq_mm.calibrate(model, loader)  # ranges, scales, fitted weights
gplq_mm.train_stage1(model, teacher, train_loader)  # or a loop of your own with gplq_mm.distill
gplq_mm.quantize_weights(model, loader)  # stage 2
gplq_mm.save(model, 'model_w4a4.pth')
model = gplq_mm.load('model_w4a4.pth', float_model)
```

**A loader** is any iterable of batches: a tensor `(B, ...)`, for `model(x)`; a tuple or list, whose
first element is taken; or a dict of tensors, for `model(**x)`. For anything else `calibrate` and
`quantize_weights` take `forward_loop=lambda model: ...`. `train_stage1` needs `(inputs, targets)`.

**What stays float** is a warning of the logger `gplq_mm`, and stands in what `quantize` returns.
What was done is logged at level INFO: `logging.basicConfig(level=logging.INFO)` shows it.

**The last layer** of a classifier keeps 8 bits where an adapter knows it (timm, torchvision,
mmpretrain). In a model of your own write `recipe=dict(rules=[dict(name='head', num_bits=8)])`.

**The gate** and `recipe='auto'` of MMEngine runs have no counterpart here: `auto` is `w4a4`.
"""


def api_functions() -> dict[str, ast.FunctionDef]:
    """Definitions of the functions in `ORDER`."""
    files = sorted((ROOT / 'gplq_mm' / 'api').glob('*.py'))
    nodes = [n for path in files for n in ast.parse(path.read_text(encoding='utf-8')).body]
    return {n.name: n for n in nodes if isinstance(n, ast.FunctionDef) and n.name in ORDER}


def signature(node: ast.FunctionDef) -> str:
    """`name(arguments) -> type`, an argument a line."""
    arguments = ast.unparse(node.args)
    parts = [
        p for p in re.split(r', (?=(?:[^\[\]()]|\[[^\[\]]*(?:\[[^\]]*\])*\])*$)', arguments) if p
    ]
    lines = ''.join(f'    {part},\n' for part in parts)
    returns = f' -> {ast.unparse(node.returns)}' if node.returns else ''
    return f'gplq_mm.{node.name}(\n{lines}){returns}'


def body(docstring: str) -> str:
    """A Google-style docstring as Markdown."""
    blocks = []
    for block in re.split(r'\n\n(?! )', docstring.strip()):
        title, _, rest = block.partition('\n')
        if title in ('Args:', 'Raises:'):
            blocks.append(f'**{title[:-1]}**\n\n{_items(textwrap.dedent(rest))}')
        elif title == 'Returns:':
            blocks.append(f'**Returns** {_plain(textwrap.dedent(rest))}')
        elif title == 'Examples:':
            blocks.append(f'```python\n{textwrap.dedent(rest)}\n```')
        else:
            blocks.append(_code(block))
    return '\n\n'.join(blocks)


def _items(text: str) -> str:
    """`name: what it is` lines as a list; a deeper indented line goes on."""
    entries = re.split(r'\n(?! )', text)
    pairs = [entry.partition(': ') for entry in entries]
    return '\n'.join(f'* `{name}`: {_plain(what)}' for name, _, what in pairs)


def _plain(text: str) -> str:
    return ' '.join(text.split()).replace('``', '`')


def _code(block: str) -> str:
    """A paragraph; one that ends with `::` is followed by code."""
    if '::\n\n' not in block:
        return block.replace('``', '`')
    text, _, code = block.partition('::\n\n')
    return f'{text}:\n\n```python\n{textwrap.dedent(code)}\n```'.replace('``T', '`T')


def render() -> str:
    """The whole document."""
    functions = api_functions()
    parts = [HEADER]
    for name in ORDER:
        node = functions[name]
        docstring = ast.get_docstring(node) or ''
        parts.append(f'## {name}\n\n```python\n{signature(node)}\n```\n\n{body(docstring)}\n')
    return '\n'.join(parts)


if __name__ == '__main__':
    TARGET.write_text(render(), encoding='utf-8')
