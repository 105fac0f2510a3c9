# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What `pip install` sees: metadata, requirements that agree, and a wheel that holds it all."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import gplq_mm
from gplq_mm.compat.installed import COMPONENTS

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = {
    'mm': 'mminstall', 'deploy': 'deploy', 'tests': 'tests', 'lint': 'lint', 'docs': 'docs'
}  # fmt: skip
SOURCES = (
    'setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md', 'model-index.yml'
)  # fmt: skip
FOLDERS = ('gplq_mm', 'configs', 'tools', 'requirements')


def requirements(name: str) -> dict[str, Requirement]:
    """Requirements of one file by name."""
    text = (ROOT / 'requirements' / f'{name}.txt').read_text(encoding='utf-8')
    lines = [line.split('#')[0].strip() for line in text.splitlines()]
    parsed = [Requirement(line) for line in lines if line]
    return {item.name: item for item in parsed}


def pin(name: str) -> str:
    """Version that `requirements/reference.txt` pins."""
    return str(requirements('reference')[name].specifier).removeprefix('==')


def test_installed_metadata() -> None:
    metadata = distribution('gplq-mm')
    assert metadata.version == gplq_mm.__version__
    assert re.fullmatch(r'\d+\.\d+\.\d+(rc\d+)?', gplq_mm.__version__)
    needed = [Requirement(line) for line in metadata.requires or []]
    assert {item.name for item in needed if not item.marker} == {'numpy', 'torch'}
    assert set(metadata.metadata.get_all('Provides-Extra')) == EXTRAS.keys()


@pytest.mark.parametrize(('extra', 'file'), EXTRAS.items())
def test_extras_are_the_requirement_files(extra: str, file: str) -> None:
    lines = [Requirement(line) for line in distribution('gplq-mm').requires or []]
    found = {r.name for r in lines if r.marker and r.marker.evaluate({'extra': extra})}
    assert found == requirements(file).keys()


@pytest.mark.parametrize('file', ['runtime', *EXTRAS.values()])
def test_reference_stack_fits_the_ranges(file: str) -> None:
    for name, requirement in requirements(file).items():
        assert requirement.specifier.contains(pin(name)), f'{requirement} excludes {pin(name)}'


@pytest.mark.parametrize('component', COMPONENTS, ids=lambda component: component.name)
def test_doctor_recommends_the_reference_stack(component) -> None:
    for name, version in re.findall(r'(\w+)==([\w.]+)', f'{component.install} {component.repair}'):
        assert version == pin(name)


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / 'gplq_mm').rglob('*.py') if '.mim' not in path.parts}
    missing = [str(f.relative_to(ROOT)) for f in folders if not (f / '__init__.py').exists()]
    assert not missing, f'wheels leave these folders out, add __init__.py: {missing}'


def test_changelog_names_what_is_new() -> None:
    text = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert re.search(r'^## \[Unreleased\]$', text, re.MULTILINE)


def test_wheel_from_sdist_holds_package_configs_and_tools(tmp_path: Path) -> None:
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    for name in FOLDERS:
        ignore = shutil.ignore_patterns('__pycache__', '.mim')
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    setup = [sys.executable, 'setup.py', '-q']
    subprocess.run([*setup, 'sdist', '-d', 'out'], cwd=tmp_path, check=True, capture_output=True)
    sdist = next((tmp_path / 'out').glob('*.tar.gz'))
    shutil.unpack_archive(sdist, tmp_path / 'unpacked')
    source = next((tmp_path / 'unpacked').iterdir())
    wheel_command = [*setup, 'bdist_wheel', '-d', str(tmp_path)]
    subprocess.run(wheel_command, cwd=source, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob('*.whl'))).namelist())

    code = {str(p.relative_to(ROOT)) for p in (ROOT / 'gplq_mm').rglob('*.py')}
    assert {name for name in code if '.mim' not in name} <= names
    configs = {f'gplq_mm/.mim/{p.relative_to(ROOT)}' for p in (ROOT / 'configs').rglob('*.py')}
    assert configs
    assert configs <= names
    assert any(name.startswith('gplq_mm/.mim/tools/') for name in names)
    metafiles = {'model-index.yml', 'configs/gplq/metafile.yml', 'configs/demo/metafile.yml'}
    assert {f'gplq_mm/.mim/{name}' for name in metafiles} <= names
    assert not [name for name in names if '__pycache__' in name or '/.mim/tools/dev/' in name]
    assert {name.split('/')[0] for name in names if '-' not in name.split('/')[0]} == {'gplq_mm'}
