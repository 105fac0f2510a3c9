# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The architecture as data: who may import whom. Lazy imports inside functions count too.

A rule that stands in the way of a good change is changed here, in the table, with its policy.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = {
    'version': 0,
    'quantizers': 0,
    'modules': 1,
    'recipe': 1,
    'conversion': 2,
    'losses': 2,
    'algorithms': 3,
    'adapters': 4,
    'compat.__init__': 0,
    'compat.installed': 0,
    'compat.torch': 0,
    'compat.timm': 4,
    'compat.mmengine': 4,
    'registry': 4,
    'utils': 4,
    'models': 5,
    'api': 5,
    'engine': 5,
    'evaluation': 5,
    'export': 5,
    'cli': 6,
    'doctor': 6,
    '__init__': 6,
    '__main__': 6,
}
TORCH_ONLY_UP_TO = 3
TORCH_ONLY = {*sys.stdlib_module_names, 'gplq_mm', 'torch'}
KNOWS_OTHER_LIBRARIES = {'adapters', 'compat.timm'}
OTHER_LIBRARIES = {'mmdet', 'mmpretrain', 'projects', 'timm', 'torchvision'}
OUTSIDE = {'configs', 'tests', 'tools'}
ROOT_MAY_IMPORT = {'typing', 'gplq_mm.compat.installed', 'gplq_mm.version'}
ROOT_MAY_DELAY = {'gplq_mm', 'gplq_mm.api'}
NO_MM = {'mmengine', 'mmcv', 'mmdet', 'mmpretrain'}
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
    def unit(self) -> str:
        """Key of `FLOORS`: the first part below `gplq_mm`, or the file of `gplq_mm.compat`."""
        return unit_of(self.name)

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
    children = ast.walk(node)
    next(children)
    return children


def is_delayed(node: ast.AST) -> bool:
    """Function bodies and `if TYPE_CHECKING:` do not run when the file is imported."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test).endswith('TYPE_CHECKING')
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def target_unit(target: str) -> str:
    """Key of `FLOORS` that an import reaches; a name of the package root counts as its own."""
    unit = unit_of(target) if '.' in target else '__init__'
    return unit if unit in FLOORS else 'version'


def unit_of(name: str) -> str:
    """First part below `gplq_mm` of a dotted path; in `compat` each file is a room of its own."""
    parts = name.split('.')[1:]
    return '.'.join(parts[:2]) if parts[0] == 'compat' else parts[0]


def goes_up(module: Module) -> Iterator[str]:
    """Imports of a higher floor."""
    floor = FLOORS.get(module.unit)
    if floor is None:
        yield f'{module.name}: unit {module.unit!r} has no floor in FLOORS'
        return
    for item in module.imports():
        if item.target.split('.')[0] == 'gplq_mm' and module.unit != '__init__':
            unit = target_unit(item.target)
            if FLOORS[unit] > floor:
                yield at(module, item, f'floor {floor} imports floor {FLOORS[unit]}')


def more_than_torch(module: Module) -> Iterator[str]:
    """Libraries other than torch on the floors of pure arithmetic."""
    if FLOORS.get(module.unit, 9) > TORCH_ONLY_UP_TO:
        return
    for item in module.imports():
        if item.target.split('.')[0] not in TORCH_ONLY:
            yield at(module, item)


def knows_other_library(module: Module) -> Iterator[str]:
    """The classes of mmdet, mmpretrain, timm or torchvision outside the adapters."""
    if module.unit in KNOWS_OTHER_LIBRARIES:
        return
    for item in module.imports():
        if item.target.split('.')[0] in OTHER_LIBRARIES:
            yield at(module, item)


def imports_its_like(folder: str) -> Callable[[Module], Iterator[str]]:
    """Rule against files of one folder that import one another; its `__init__` may."""

    def check(module: Module) -> Iterator[str]:
        if not module.name.startswith(folder + '.') or module.name.endswith('__init__'):
            return
        for item in module.imports():
            if f'{item.target}.'.startswith(f'{folder}.'):
                yield at(module, item)

    return check


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


def api_knows_mm(module: Module) -> Iterator[str]:
    """MMEngine, or what needs it, in the functions for torch alone."""
    if module.unit != 'api':
        return
    for item in module.imports():
        root, unit = item.target.split('.')[0], target_unit(item.target)
        if root in NO_MM or (root == 'gplq_mm' and unit in ('engine', 'evaluation', 'registry')):
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
        'Floors 0-3 import torch and the standard library only, so that they can be tested and '
        'reused alone: whatever knows MMEngine belongs on floor 4 or 5.',
        more_than_torch,
    ),
    'library': (
        "Only adapters know another library's classes: register a handler in gplq_mm/adapters/.",
        knows_other_library,
    ),
    'adapters': (
        'Adapters do not import one another, or a missing library takes the others down: '
        'move what they share to gplq_mm/conversion/.',
        imports_its_like('gplq_mm.adapters'),
    ),
    'hooks': (
        'Hooks do not import hooks: a hook says when, the arithmetic they share goes down.',
        imports_its_like('gplq_mm.engine.hooks'),
    ),
    'outside': ('The package imports no tools, configs or tests.', leaves_the_package),
    'star': ('No `import *`: nobody can tell where a name comes from.', imports_star),
    'mm': (
        'gplq_mm.api works with torch alone: what it shares with MMEngine runs goes to floor 3.',
        api_knows_mm,
    ),
    'root': (
        '`import gplq_mm` gives the version and the feature checks, needs no other library; the '
        'functions of gplq_mm.api are imported at their first use.',
        root_is_heavy,
    ),
}

# One file that breaks each rule, and one that is close to it and fine.
EXAMPLES = [
    ('down', 'gplq_mm.quantizers.a', 'def f():\n    from ..modules import QuantLinear', True),
    ('down', 'gplq_mm.conversion.a', 'from gplq_mm.quantizers import QuantSpec', False),
    ('down', 'gplq_mm.nowhere.a', '', True),
    ('down', 'gplq_mm.modules.a', 'from ..compat.torch import own_tensor', False),
    ('down', 'gplq_mm.modules.a', 'from ..compat.mmengine import is_resumed', True),
    ('torch', 'gplq_mm.algorithms.a', 'from mmengine.logging import print_log', True),
    ('torch', 'gplq_mm.quantizers.a', 'import numpy as np', True),
    ('torch', 'gplq_mm.quantizers.a', 'import math\nfrom torch import nn', False),
    ('library', 'gplq_mm.models.a', 'def f():\n    import mmdet.models', True),
    ('library', 'gplq_mm.api.a', 'def f():\n    import timm', True),
    ('library', 'gplq_mm.adapters.mmdet', 'from mmdet.models import WindowMSA', False),
    ('adapters', 'gplq_mm.adapters.mmdet', 'from .mmcv import convert_ffn', True),
    ('adapters', 'gplq_mm.adapters.__init__', 'from .mmcv import convert_ffn', False),
    ('hooks', 'gplq_mm.engine.hooks.a', 'from gplq_mm.engine.hooks import GPLQHook', True),
    ('hooks', 'gplq_mm.engine.hooks.a', 'from gplq_mm.engine.stages import run', False),
    ('outside', 'gplq_mm.engine.a', 'from tools.train import main', True),
    ('outside', 'gplq_mm.engine.a', 'from gplq_mm.utils.tools import main', False),
    ('star', 'gplq_mm.models.__init__', 'from .necks import *', True),
    ('star', 'gplq_mm.models.__init__', 'from .necks import Neck', False),
    ('root', 'gplq_mm.__init__', 'from gplq_mm.models import GPLQ', True),
    ('root', 'gplq_mm.__init__', 'from .compat.installed import is_installed', False),
    ('root', 'gplq_mm.__init__', 'from gplq_mm.api import quantize', True),
    ('root', 'gplq_mm.__init__', 'def f():\n    from gplq_mm.api import quantize', False),
    ('mm', 'gplq_mm.api.a', 'def f():\n    import mmengine', True),
    ('mm', 'gplq_mm.api.a', 'from ..engine.checkpoint import record', True),
    ('mm', 'gplq_mm.api.a', 'from ..models.mimic_terms import build_term', False),
]


def python_files(folder: str) -> list[Path]:
    """Python files below a folder, those in hidden folders left out."""
    paths = (path for path in (ROOT / folder).rglob('*.py'))
    parts = {path: path.relative_to(ROOT).parts for path in paths}
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
    assert find_cycle({'a': ['b'], 'b': ['c'], 'c': ['b']}) == ['b', 'c', 'b']
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
for blocked in ('mmengine', 'mmcv', 'mmdet', 'mmpretrain'):
    sys.modules[blocked] = None
for name in sys.argv[1:]:
    import_module(name)
print('imported', len(sys.argv) - 1)
"""


def test_lower_floors_import_without_any_mm_package() -> None:
    low = [m.name for m in package() if FLOORS.get(m.unit, 9) <= TORCH_ONLY_UP_TO]
    low += [m.name for m in package() if m.unit == 'api']
    names = ['gplq_mm', *(name.removesuffix('.__init__') for name in low)]
    command = [sys.executable, '-c', IMPORT_WITHOUT_MM, *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['imported', str(len(names))]
