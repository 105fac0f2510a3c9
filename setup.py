# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Packaging: metadata, extras from `requirements/`, `configs/` and `tools/` inside the wheel."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHIPPED = ('configs', 'tools')
INDEX = 'model-index.yml'
NOT_SHIPPED = ('__pycache__', '*.pyc', 'dev')


def read_version() -> str:
    """Read `__version__` without importing the package.

    Raises:
        RuntimeError: `gplq_mm/version.py` has no `__version__ = '...'` line.
    """
    text = (ROOT / 'gplq_mm' / 'version.py').read_text(encoding='utf-8')
    found = re.search(r"^__version__ = '([^']+)'$", text, re.MULTILINE)
    if found is None:
        raise RuntimeError("gplq_mm/version.py must hold the line __version__ = 'X.Y.Z'")
    return found.group(1)


def read_requirements(name: str) -> list[str]:
    """Read the lines of `requirements/<name>.txt`, comments left out."""
    text = (ROOT / 'requirements' / f'{name}.txt').read_text(encoding='utf-8')
    lines = (line.split('#')[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


class BuildPyWithMim(build_py):
    """Put configs, tools and `model-index.yml` into `gplq_mm/.mim/`, where MIM looks for them.

    A wheel gets copies; an editable install gets links, so that edits show at once.
    """

    def run(self) -> None:
        """Build the package, then add the shipped folders."""
        super().run()
        editable = getattr(self, 'editable_mode', False)
        target = (ROOT if editable else Path(self.build_lib)) / 'gplq_mm' / '.mim'
        target.mkdir(parents=True, exist_ok=True)
        for name in (*SHIPPED, INDEX):
            if editable:
                self.link(target / name, ROOT / name)
            elif name == INDEX:
                shutil.copy(ROOT / name, target)
            else:
                ignore = shutil.ignore_patterns(*NOT_SHIPPED)
                shutil.copytree(ROOT / name, target / name, ignore=ignore, dirs_exist_ok=True)

    @staticmethod
    def link(link: Path, source: Path) -> None:
        """Point `link` at a file or folder, whatever it pointed at before."""
        if link.is_symlink():
            link.unlink()
        if not link.exists():
            link.symlink_to(source, target_is_directory=source.is_dir())


if __name__ == '__main__':
    readme = ROOT / 'README.md'
    setup(
        name='gplq-mm',
        version=read_version(),
        description='GPLQ: quantization-aware training of vision transformers '
        'inside MMDetection, MMPretrain and MMSegmentation, or with torch alone',
        long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
        long_description_content_type='text/markdown',
        license='Apache-2.0',
        author='gplq_mm contributors',
        keywords='quantization, QAT, PTQ, vision transformer, object detection, segmentation',
        classifiers=[
            'Development Status :: 4 - Beta',
            'License :: OSI Approved :: Apache Software License',
            'Operating System :: OS Independent',
            'Programming Language :: Python :: 3',
            'Topic :: Scientific/Engineering :: Artificial Intelligence',
        ],
        packages=find_packages(include=['gplq_mm', 'gplq_mm.*']),
        package_data={
            'gplq_mm.quantizers.packing': ['csrc/*.c'],
            'gplq_mm.ops.backends.integer': ['csrc/*.c'],
            'gplq_mm.pages': ['templates/*'],
        },
        python_requires='>=3.10',
        install_requires=read_requirements('runtime'),
        extras_require={
            'mm': read_requirements('mminstall'),
            'deploy': read_requirements('deploy'),
            'tests': read_requirements('tests'),
            'lint': read_requirements('lint'),
            'docs': read_requirements('docs'),
        },
        cmdclass={'build_py': BuildPyWithMim},
        zip_safe=False,
    )
