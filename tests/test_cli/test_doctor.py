# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""`doctor` on made-up libraries (`-S` hides the installed ones), and on the real ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gplq_mm import is_installed
from gplq_mm.cli.doctor import NEEDS
from gplq_mm.compat.installed import COMPONENTS

ROOT = Path(__file__).resolve().parents[2]

VERSION_CHECK = """
import mmcv
__version__ = '3.3.0'
assert mmcv.__version__ < '2.2.0', (
    f'MMCV=={mmcv.__version__} is used but incompatible. '
    'Please install mmcv>=2.0.0rc4, <2.2.0.')
"""
FAKES = {
    'torch/__init__.py': """
__version__ = '2.11.0'
class nn:
    class functional:
        scaled_dot_product_attention = None
class version:
    cuda = '13.0'
class cuda:
    is_available = staticmethod(lambda: False)
    get_device_name = staticmethod(lambda index: 'a GPU')
def from_numpy(array):
    return array
""",
    'torchvision/__init__.py': "__version__ = '0.26.0'",
    'torchvision/ops.py': '',
    'numpy/__init__.py': "__version__ = '2.4.6'\ndef zeros(n):\n    return [0.0] * n",
    'mmengine/__init__.py': "__version__ = '0.10.7'",
    'mmcv/__init__.py': "__version__ = '2.1.0'",
    'mmcv/ops.py': "def get_compiling_cuda_version():\n    return 'not available'",
    'mmdet/__init__.py': VERSION_CHECK,
    'mmdet/structures.py': '',
    'mmpretrain/__init__.py': "__version__ = '1.2.0'",
    'mmpretrain/structures.py': '',
    'mmseg/__init__.py': "__version__ = '1.2.2'",
    'mmseg/structures.py': '',
    'mmseg/models.py': '',
    'pycocotools/__init__.py': "__version__ = '2.0.11'",
    'pycocotools/mask.py': '',
}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of made-up libraries that fit one another."""
    for name, text in FAKES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding='utf-8')
    return tmp_path


def doctor(site: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m gplq_mm doctor` with no library but those in `site`."""
    command = [sys.executable, '-S', '-m', 'gplq_mm', 'doctor', *options]
    env = {'PYTHONPATH': f'{site}:{ROOT}'}
    return subprocess.run(command, capture_output=True, text=True, cwd=site, env=env)


def report(site: Path) -> tuple[int, dict[str, bool], dict[str, dict[str, str]]]:
    """Exit code, what can run, and the components by name."""
    done = doctor(site, '--json')
    content = json.loads(done.stdout)
    return done.returncode, content['runs'], {c['name']: c for c in content['components']}


def test_all_is_well(site: Path) -> None:
    code, runs, parts = report(site)
    assert code == 0
    assert runs == {'detection': True, 'classification': True, 'segmentation': True}
    assert list(parts) == ['python', *(component.name for component in COMPONENTS)]
    assert {part['state'] for part in parts.values()} == {'ok'}
    assert not any(part['mend'] for part in parts.values())
    assert parts['mmcv']['why'] == 'operators: CPU'


def test_nothing_installed(tmp_path: Path) -> None:
    code, runs, parts = report(tmp_path)
    assert code == 1
    assert not any(runs.values())
    for component in COMPONENTS:
        assert parts[component.name]['state'] == 'missing'
        assert parts[component.name]['mend'] == component.install


@pytest.mark.parametrize(
    ('missing', 'stopped'),
    [
        ('mmdet', 'detection'),
        ('mmpretrain', 'classification'),
        ('mmseg', 'segmentation'),
        ('pycocotools', 'detection'),
    ],
)
def test_one_missing(site: Path, missing: str, stopped: str) -> None:
    shutil.rmtree(site / missing)
    code, found, parts = report(site)
    assert code == 1
    assert [task for task, can in found.items() if not can] == [stopped]
    assert parts[missing]['mend'].startswith('pip install')


def test_mmdet_refuses_mmcv(site: Path) -> None:
    (site / 'mmcv' / '__init__.py').write_text("__version__ = '2.2.0'", encoding='utf-8')
    code, runs, parts = report(site)
    assert (code, runs['detection'], runs['classification']) == (1, False, True)
    assert parts['mmdet']['state'] == 'clashes'
    assert 'MMCV==2.2.0 is used but incompatible' in parts['mmdet']['why']
    expected = "MMCV_WITH_OPS=1 pip install --no-build-isolation 'mmcv>=2.0.0rc4,<2.2.0'"
    assert parts['mmdet']['mend'] == expected


@pytest.mark.parametrize(
    ('name', 'needed'), [('mmdet', '3.0'), ('mmpretrain', '1.0'), ('mmseg', '1.0')]
)
def test_an_old_library_that_imports(site: Path, name: str, needed: str) -> None:
    (site / name / 'structures.py').unlink()
    code, _, parts = report(site)
    assert (code, parts[name]['state']) == (1, 'clashes')
    assert f'>= {needed} is needed' in parts[name]['why']
    assert parts[name]['mend'].startswith(f'pip install {name}')


@pytest.mark.parametrize(
    'operators',
    [
        'from mmcv import _ext',
        "raise ImportError('undefined symbol: _ZN2at')",
        "raise OSError('libc10.so: cannot open shared object file')",
    ],
)
def test_mmcv_without_usable_operators(site: Path, operators: str) -> None:
    (site / 'mmcv' / 'ops.py').write_text(operators, encoding='utf-8')
    code, runs, parts = report(site)
    assert code == 1
    assert not any(runs.values())
    assert parts['mmcv']['state'] == 'clashes'
    assert 'mmcv==2.1.0' in parts['mmcv']['mend']
    assert '--force-reinstall' in parts['mmcv']['mend']


def test_gpu_with_cpu_operators(site: Path) -> None:
    path = site / 'torch' / '__init__.py'
    text = path.read_text(encoding='utf-8').replace('lambda: False', 'lambda: True')
    path.write_text(text, encoding='utf-8')
    code, _, parts = report(site)
    assert code == 1
    assert parts['torch']['why'] == 'CUDA 13.0: a GPU'
    assert 'built for the CPU only' in parts['mmcv']['why']


def test_error_of_a_dependency_names_the_dependency(site: Path) -> None:
    (site / 'mmengine' / '__init__.py').write_text('import pkg_resources', encoding='utf-8')
    _, _, parts = report(site)
    assert parts['mmengine']['state'] == 'clashes'
    assert parts['mmengine']['mend'] == "pip install 'setuptools<81'"


def test_table_ends_with_what_fixes_it(site: Path) -> None:
    shutil.rmtree(site / 'mmpretrain')
    lines = doctor(site).stdout.splitlines()
    assert lines[0].split() == ['name', 'version', 'state', 'why']
    row = next(line for line in lines if line.startswith('mmpretrain'))
    assert row.split() == ['mmpretrain', 'missing', 'not', 'installed']
    assert 'classification: CANNOT RUN' in lines
    assert lines[-1].strip() == 'pip install mmpretrain==1.2.0'


def test_every_need_is_inspected() -> None:
    names = {'python', *(component.name for component in COMPONENTS)}
    assert names == set().union(*NEEDS.values())


@pytest.mark.skipif(
    not all(map(is_installed, ('mmdet', 'mmpretrain', 'mmseg'))), reason='needs the libraries'
)
def test_short_form_on_the_real_libraries() -> None:
    command = [sys.executable, '-m', 'gplq_mm.doctor', '--json']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {c['state'] for c in json.loads(done.stdout)['components']} == {'ok'}
