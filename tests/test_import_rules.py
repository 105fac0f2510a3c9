# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The architecture as data: who may import whom. Lazy imports inside functions count too.

A rule that stands in the way of a good change is changed here, in the table, with its policy.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = {
    'version': 0,
    'compat': 0,
    'quantizers': 1,
    'recipe': 2,
    'ops': 2,
    'convert': 3,
    'stream': 4,
    'distillation': 5,
    'calibration': 6,
    'ptq': 7,
    'analysis': 8,
    'deployment': 9,
    'integrations.__init__': 9,
    'integrations.loading': 9,
    'integrations.mm.model_structure': 9,
    'integrations.mm.pixel_scores': 9,
    'integrations.mm.roi_features': 9,
    'api': 10,
    'compat.mmengine': 11,
    'compat.timm': 11,
    'pages': 11,
    'registry': 11,
    'integrations': 12,
    'cli': 13,
    'doctor': 15,
    '__init__': 14,
    '__main__': 14,
}
"""Dotted path below `gplq_mm` -> floor; the longest one that a file's path begins with counts."""
TORCH_ONLY_UP_TO = 10
TORCH_ONLY = {*sys.stdlib_module_names, 'gplq_mm', 'torch'}
PARTS = re.compile(r'\b_?(bbox|box|decode|mask|panoptic|roi|rpn)_heads?\b')
HEAD_NAMES = {'head', '_head'}  # strings by which one would look for the head of an MM model
LIBRARY_FOLDERS = {
    'integrations.mm.adapters.mmcv',
    'integrations.mm.adapters.mmdet',
    'integrations.mm.adapters.mmpretrain',
    'integrations.mm.adapters.mmseg',
    'integrations.timm',
    'integrations.torchvision',
}
KNOWS_OTHER_LIBRARIES = {*LIBRARY_FOLDERS, 'compat.timm'}
OTHER_LIBRARIES = {'mmdet', 'mmpretrain', 'mmseg', 'projects', 'timm', 'torchvision'}
OUTSIDE = {'configs', 'tests', 'tools'}
ROOT_MAY_IMPORT = {'typing', 'gplq_mm.compat.installed', 'gplq_mm.version'}
ROOT_MAY_DELAY = {'gplq_mm', 'gplq_mm.api'}
LONGEST = {'gplq_mm': 400, 'tools': 400, 'tests': 400, 'configs': 100, 'configs/gplq': 25}
LICENSE_LINE = '# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.'


@dataclass(frozen=True)
class Import:
    """One imported name: absolute dotted path, line, and whether importing the file runs it."""

    target: str
    line: int
    at_import_time: bool


@dataclass(frozen=True)
class Module:
    """One file of the package; `name` is its dotted path, `__init__` included."""

    name: str
    text: str

    @property
    def room(self) -> str:
        """Key of `FLOORS`."""
        return room_of(self.name)

    def imports(self) -> Iterator[Import]:
        """List all imports, those inside functions too."""
        tree = ast.parse(self.text)
        delayed = {id(child) for node in ast.walk(tree) if is_delayed(node) for child in walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self.base(node)
                targets = [f'{base}.{alias.name}' for alias in node.names]
            else:
                continue
            for target in targets:
                yield Import(target, node.lineno, id(node) not in delayed)

    def base(self, node: ast.ImportFrom) -> str:
        """Dotted path behind `from`, relative ones made absolute."""
        if not node.level:
            return node.module or ''
        parents = self.name.split('.')[: -node.level]
        return '.'.join([*parents, *([node.module] if node.module else [])])


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All descendants."""
    return (child for child in ast.walk(node) if child is not node)


def is_delayed(node: ast.AST) -> bool:
    """Function bodies and `if TYPE_CHECKING:` do not run when the file is imported."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test).endswith('TYPE_CHECKING')
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def room_of(name: str) -> str:
    """Key of `FLOORS` that a dotted path below `gplq_mm` begins with; empty where none does."""
    parts = name.split('.')[1:]
    heads = ('.'.join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((head for head in heads if head in FLOORS), '')


def reached_room(target: str) -> str:
    """Key of `FLOORS` that an import reaches; a name of the package root counts as its version."""
    return room_of(target) or 'version'


def is_within(name: str, folders: set[str]) -> str:
    """The folder, as a dotted path below `gplq_mm`, that holds a module; empty for none."""
    path = f'{name.partition(".")[2]}.'
    return next((folder for folder in folders if path.startswith(f'{folder}.')), '')


def goes_up(module: Module) -> Iterator[str]:
    """Imports of a higher floor, or of another room on the same floor."""
    if not module.room:
        yield f'{module.name}: no entry of FLOORS'
        return
    floor = FLOORS[module.room]
    for item in module.imports():
        if item.target.split('.')[0] != 'gplq_mm' or module.room == '__init__':
            continue
        room = reached_room(item.target)
        if FLOORS[room] > floor or (FLOORS[room] == floor and is_other_room(room, module.room)):
            yield at(module, item, f'{module.room} (floor {floor}) imports {room} ({FLOORS[room]})')


def is_other_room(first: str, second: str) -> bool:
    """Whether two keys of `FLOORS` name different folders below `gplq_mm`, or files there."""
    return first.split('.')[0] != second.split('.')[0]


def more_than_torch(module: Module) -> Iterator[str]:
    """Libraries other than torch on the floors of pure arithmetic."""
    if FLOORS.get(module.room, 99) > TORCH_ONLY_UP_TO:
        return
    for item in module.imports():
        if item.target.split('.')[0] not in TORCH_ONLY:
            yield at(module, item)


def knows_other_library(module: Module) -> Iterator[str]:
    """The classes of mmdet, mmpretrain, timm or torchvision outside their folders."""
    if is_within(module.name, KNOWS_OTHER_LIBRARIES):
        return
    for item in module.imports():
        if item.target.split('.')[0] in OTHER_LIBRARIES:
            yield at(module, item)


def knows_parts_of_models(module: Module) -> Iterator[str]:
    """Names of heads below the integrations: attributes, variables, arguments and strings."""
    room = module.room.split('.')[0]
    if room == 'integrations' or FLOORS.get(module.room, 99) > TORCH_ONLY_UP_TO:
        return
    for node in walk(ast.parse(module.text)):
        words = [getattr(node, key, None) for key in ('attr', 'id', 'arg', 'value')]
        names = [word for word in words if isinstance(word, str)]
        found = [match[0] for name in names for match in PARTS.finditer(name)]
        if isinstance(node, ast.Constant):
            found += [name for name in names if name in HEAD_NAMES]
        for name in found:
            yield f'{module.name}, line {node.lineno}: {name}'  # type: ignore[attr-defined]


def imports_another_adapter(module: Module) -> Iterator[str]:
    """One library's handlers that import another library's."""
    own = is_within(module.name, LIBRARY_FOLDERS)
    for item in module.imports():
        other = is_within(item.target, LIBRARY_FOLDERS)
        if own and other and other != own:
            yield at(module, item)


def leaves_the_package(module: Module) -> Iterator[str]:
    """Imports of tools, configs or tests."""
    for item in module.imports():
        if item.target.split('.')[0] in OUTSIDE:
            yield at(module, item)


def imports_star(module: Module) -> Iterator[str]:
    """`from x import *`."""
    for item in module.imports():
        if item.target.endswith('.*'):
            yield at(module, item)


def root_is_heavy(module: Module) -> Iterator[str]:
    """More than the version and the feature checks when the package's `__init__` runs."""
    if module.name != 'gplq_mm.__init__':
        return
    for item in module.imports():
        allowed = ROOT_MAY_IMPORT if item.at_import_time else ROOT_MAY_IMPORT | ROOT_MAY_DELAY
        if item.target.rpartition('.')[0] not in allowed:
            yield at(module, item)


def at(module: Module, item: Import, remark: str = '') -> str:
    """Say where a rule is broken."""
    return f'{module.name}, line {item.line}: imports {item.target} {remark}'.rstrip()


RULES = {
    'down': ('Imports go down only: see FLOORS. Move the code down, or pass it in.', goes_up),
    'torch': (
        'Floors 0-10 import torch and the standard library only, so that they can be tested and '
        'reused alone: whatever knows MMEngine or another library belongs to integrations.',
        more_than_torch,
    ),
    'library': (
        "Only a library's own folder knows its classes: register a handler in "
        'gplq_mm/integrations/timm/, torchvision/ or mm/adapters/.',
        knows_other_library,
    ),
    'parts': (
        'Rooms below integrations know no detectors and no MM models: tell them with '
        'register_model_facts or register_feature_source, see integrations/mm/model_structure.py.',
        knows_parts_of_models,
    ),
    'adapters': (
        'Adapters do not import one another, or a missing library takes the others down: '
        'move what they share to gplq_mm/convert/.',
        imports_another_adapter,
    ),
    'outside': ('The package imports no tools, configs or tests.', leaves_the_package),
    'star': ('No `import *`: nobody can tell where a name comes from.', imports_star),
    'root': (
        '`import gplq_mm` gives the version and the feature checks, needs no other library; the '
        'functions of gplq_mm.api are imported at their first use.',
        root_is_heavy,
    ),
}

MM = 'gplq_mm.integrations.mm'
# One file that breaks each rule, and one that is close to it and fine.
EXAMPLES = [
    ('down', 'gplq_mm.quantizers.a', 'def f():\n    from ..ops import QuantLinear', True),
    ('down', 'gplq_mm.convert.a', 'from gplq_mm.quantizers import QuantSpec', False),
    ('down', 'gplq_mm.nowhere.a', '', True),
    ('down', 'gplq_mm.ops.a', 'from ..compat.torch import own_tensor', False),
    ('down', 'gplq_mm.ops.a', 'from ..compat.mmengine import is_resumed', True),
    ('down', 'gplq_mm.ops.a', 'from ..recipe import Recipe', True),
    ('down', 'gplq_mm.calibration.a', 'from ..ptq.stage2 import run_stage2', True),
    ('down', 'gplq_mm.api.a', 'from ..integrations.mm.run import teacher', True),
    ('down', 'gplq_mm.api.a', 'from ..integrations.loading import load_adapters', False),
    ('down', 'gplq_mm.api.a', 'from ..distillation.mimic_terms import build_term', False),
    ('down', f'{MM}.run.a', 'from ..checkpoints.resume import resumable_checkpoint', False),
    ('torch', 'gplq_mm.ptq.a', 'from mmengine.logging import print_log', True),
    ('torch', 'gplq_mm.api.a', 'def f():\n    import mmengine', True),
    ('torch', 'gplq_mm.integrations.loading', 'import mmengine', True),
    ('torch', 'gplq_mm.quantizers.a', 'import numpy as np', True),
    ('torch', 'gplq_mm.quantizers.a', 'import math\nfrom torch import nn', False),
    ('torch', f'{MM}.a', 'import mmengine', False),
    ('library', 'gplq_mm.distillation.a', 'def f():\n    import mmdet.models', True),
    ('library', 'gplq_mm.api.a', 'def f():\n    import timm', True),
    ('library', f'{MM}.run.a', 'from mmdet.models import WindowMSA', True),
    ('library', f'{MM}.adapters.mmdet.a', 'from mmdet.models import WindowMSA', False),
    ('parts', 'gplq_mm.ptq.a', "hasattr(model, 'roi_head')", True),
    ('parts', 'gplq_mm.ptq.a', 'features = model.rpn_head(x)', True),
    ('parts', 'gplq_mm.convert.a', "HEADS = ('bbox_head', 'mask_head')", True),
    ('parts', 'gplq_mm.ptq.a', "is_last = owner.endswith('head')", True),
    ('parts', 'gplq_mm.ptq.a', 'per_head = self.head(x)', False),
    ('parts', f'{MM}.model_structure', "BOX_HEADS = ('roi_head',)", False),
    ('adapters', f'{MM}.adapters.mmdet.a', 'from ..mmcv.layers import convert_ffn', True),
    ('adapters', f'{MM}.adapters.mmdet.a', 'from .vitdet import convert_block', False),
    ('adapters', 'gplq_mm.integrations.timm.a', 'from ..torchvision import swin', True),
    ('outside', f'{MM}.a', 'from tools.train import main', True),
    ('outside', f'{MM}.a', 'from gplq_mm.integrations.mm.launch.tools import run_tool', False),
    ('star', 'gplq_mm.ops.__init__', 'from .linear import *', True),
    ('star', 'gplq_mm.ops.__init__', 'from .linear import QuantLinear', False),
    ('root', 'gplq_mm.__init__', 'from gplq_mm.ops import QuantLinear', True),
    ('root', 'gplq_mm.__init__', 'from .compat.installed import is_installed', False),
    ('root', 'gplq_mm.__init__', 'from gplq_mm.api import quantize', True),
    ('root', 'gplq_mm.__init__', 'def f():\n    from gplq_mm.api import quantize', False),
]


def python_files(folder: str) -> list[Path]:
    """Python files below a folder, those in hidden folders left out."""
    parts = {path: path.relative_to(ROOT).parts for path in (ROOT / folder).rglob('*.py')}
    return sorted(path for path in parts if not any(p.startswith('.') for p in parts[path]))


def package() -> list[Module]:
    """Every file of the package."""
    names = {path: path.relative_to(ROOT).with_suffix('').parts for path in python_files('gplq_mm')}
    return [Module('.'.join(names[path]), path.read_text(encoding='utf-8')) for path in names]


@pytest.mark.parametrize('rule', RULES)
def test_package_keeps_the_rule(rule: str) -> None:
    policy, check = RULES[rule]
    broken = [line for module in package() for line in check(module)]
    assert not broken, '\n'.join([policy, *broken])


@pytest.mark.parametrize(('rule', 'name', 'text', 'breaks'), EXAMPLES)
def test_rule_tells_good_from_bad(rule: str, name: str, text: str, breaks: bool) -> None:
    assert bool(list(RULES[rule][1](Module(name, text)))) is breaks


def test_no_import_cycles() -> None:
    files = {module.name.removesuffix('.__init__'): module for module in package()}
    graph = {}
    for name, module in files.items():
        eager = [item.target for item in module.imports() if item.at_import_time]
        reached = {target if target in files else target.rpartition('.')[0] for target in eager}
        graph[name] = sorted(reached & files.keys() - {name})
    cycle = find_cycle(graph)
    assert not cycle, f'Files that import one another have no order: {" -> ".join(cycle)}'


def find_cycle(graph: dict[str, list[str]]) -> list[str]:
    """Return one cycle of a graph, closed, or an empty list."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        found = next((c for n in graph[node] if (c := visit(n, [*trail, node]))), [])
        done.add(node)
        return found

    return next((cycle for node in graph if (cycle := visit(node, []))), [])


def test_find_cycle() -> None:
    assert find_cycle({'a': ['b', 'c'], 'b': ['c'], 'c': ['b']}) == ['b', 'c', 'b']
    assert find_cycle({'a': ['b', 'c'], 'b': ['c'], 'c': []}) == []


@pytest.mark.parametrize('folder', LONGEST)
def test_files_are_short(folder: str) -> None:
    lengths = {p: len(p.read_text(encoding='utf-8').splitlines()) for p in python_files(folder)}
    long = [f'{p.relative_to(ROOT)}: {n}' for p, n in lengths.items() if n > LONGEST[folder]]
    assert not long, '\n'.join([f'{folder}/: {LONGEST[folder]} lines at most; split:', *long])


def test_files_begin_with_the_license() -> None:
    files = [path for folder in ('gplq_mm', 'tools', 'tests') for path in python_files(folder)]
    code = [path.relative_to(ROOT) for path in files if 'configs' not in path.parts]
    texts = {path: (ROOT / path).read_text(encoding='utf-8') for path in code}
    bad = [str(path) for path, text in texts.items() if text and not text.startswith(LICENSE_LINE)]
    assert not bad, '\n'.join([f'the first line must be {LICENSE_LINE!r}:', *bad])


IMPORT_WITHOUT_MM = """
import sys
from importlib import import_module
for blocked in ('mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'mmseg'):
    sys.modules[blocked] = None
for name in sys.argv[1:]:
    import_module(name)
print('imported', len(sys.argv) - 1)
"""


def test_lower_floors_import_without_any_mm_package() -> None:
    low = [m.name for m in package() if FLOORS.get(m.room, 99) <= TORCH_ONLY_UP_TO]
    names = ['gplq_mm', *(name.removesuffix('.__init__') for name in low)]
    command = [sys.executable, '-c', IMPORT_WITHOUT_MM, *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['imported', str(len(names))]
