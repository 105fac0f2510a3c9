# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Write docs/api.md from the docstrings of the functions in `gplq_mm`, without importing it.

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
    'deploy',
    'save',
    'load',
)
HEADER = """\
# Functions for plain torch

Written by `tools/dev/write_api_docs.py` from the docstrings; a test compares it with them.

`import gplq_mm` imports no library. The functions need torch; a model of timm, torchvision,
mmpretrain or mmdet also needs its library. Call them in this order; each works in place:

```python
import copy, gplq_mm

teacher = copy.deepcopy(model)  # the float model
gplq_mm.quantize(model, 'w4a4')  # quantizers, nothing calibrated
gplq_mm.calibrate(model, loader)  # ranges, scales, fitted weights
gplq_mm.train_stage1(model, teacher, train_loader)  # or your own loop with gplq_mm.distill
gplq_mm.quantize_weights(model, loader)  # stage 2
gplq_mm.save(model, 'model_w4a4.pth')
model = gplq_mm.load('model_w4a4.pth', float_model)
```

**A loader** is any iterable of batches: a tensor `(B, ...)`, for `model(x)`; a tuple or list, whose
first element is used; or a dict of tensors, for `model(**x)`. For anything else `calibrate` and
`quantize_weights` take `forward_loop=lambda model: ...`. `train_stage1` needs `(inputs, targets)`.

**Operations that stay float** are warnings of the logger `gplq_mm` and in the result of `quantize`.
Other messages have level INFO; `logging.basicConfig(level=logging.INFO)` shows them.

**The last layer** of a classifier gets 8 bits if an adapter knows it (timm, torchvision,
mmpretrain). In other models write `recipe=dict(rules=[dict(name='head', num_bits=8)])`.

**The gate** is the end of `calibrate`: it compares the calibrated model with the float one on the
images of the loader that follow, and raises a ValueError before training if their features are too
far apart. `recipe='auto'` gives the roles with the largest error more bits instead.
"""


def api_functions() -> dict[str, ast.FunctionDef]:
    """Definitions of the functions in `ORDER`."""
    files = sorted((ROOT / 'gplq_mm' / 'api').glob('*.py'))
    nodes = [n for path in files for n in ast.parse(path.read_text(encoding='utf-8')).body]
    return {n.name: n for n in nodes if isinstance(n, ast.FunctionDef) and n.name in ORDER}


def signature(node: ast.FunctionDef) -> str:
    """`name(arguments) -> type`, one argument per line."""
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
    """`name: what it is` lines as a list; a deeper indented line continues one."""
    entries = re.split(r'\n(?! )', text)
    pairs = [entry.partition(': ') for entry in entries]
    return '\n'.join(f'* `{name}`: {_plain(what)}' for name, _, what in pairs)


def _plain(text: str) -> str:
    return ' '.join(text.split()).replace('``', '`')


def _code(block: str) -> str:
    """A paragraph; `::` at its end starts a code block."""
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
