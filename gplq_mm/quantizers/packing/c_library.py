# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A C file of the package as a library, compiled at run time for this processor.

A C file without torch's headers compiles in about a second (``torch.compile`` of the same
passes: minutes on two cores); the library is stored in the user's cache folder. What is loaded runs
with the user's rights: the folder is the user's own and closed to others, and a library's name ends
with the hash of its content, which is compared before it is loaded.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from ...compat.cache_folder import cache_folder

SWITCH = 'GPLQ_CPU_KERNELS'
"""Environment variable: ``0`` turns everything compiled off."""
_FLAGS = ['-O3', '-march=native', '-ffp-contract=off', '-fno-math-errno', '-fno-trapping-math']
_FLAGS += ['-std=gnu11', '-fPIC']


T = TypeVar('T')


class LibraryError(RuntimeError):
    """A C file could not be compiled or loaded; its text is one line."""


def load_functions(source: Path, wrap: Callable[[ctypes.CDLL], T]) -> tuple[T | None, str]:
    """The functions of a C file, unless the user turned compiled code off.

    Args:
        source: The file.
        wrap: Finds the functions in the library; an AttributeError says that one is missing.

    Returns:
        ``(functions, '')``, or ``(None, reason)``.
    """
    if os.environ.get(SWITCH) == '0':
        return None, f'{SWITCH}=0'
    try:
        return wrap(load_library(source)), ''
    except (LibraryError, AttributeError) as error:
        return None, f'no compiled ones: {error}'


def load_library(source: Path) -> ctypes.CDLL:
    """Compile a C file, unless the cache has its library, and load it.

    Args:
        source: The file. A change of its text, the compiler or the processor compiles anew.

    Raises:
        LibraryError: If there is no compiler, or compiling or loading fails.
    """
    try:
        return ctypes.CDLL(str(_compiled(source)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()
        raise LibraryError(reason[-1] if reason else repr(error)) from error


def _compiled(source: Path) -> Path:
    """Path of the shared library, compiled if the cache has no whole one."""
    compiler = os.environ.get('CC') or shutil.which('gcc') or shutil.which('cc')
    if compiler is None:
        raise OSError('no C compiler')
    openmp = _openmp_library()
    key = '\n'.join([source.read_text(), compiler, *_FLAGS, str(openmp), _processor()])
    folder = cache_folder()
    stem = f'{source.stem}_{hashlib.sha256(key.encode()).hexdigest()[:16]}'
    for path in sorted(folder.glob(f'{stem}_*.so')):
        if path.name == _named_by_content(stem, path):
            return path
        path.unlink(missing_ok=True)  # truncated, changed or planted
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = _compile(source, compiler, openmp, Path(scratch))
        path = folder / _named_by_content(stem, built)
        os.replace(built, path)  # safe for several processes at once
    return path


def _named_by_content(stem: str, library: Path) -> str:
    """File name of a library: its stem, and the hash of its content."""
    return f'{stem}_{hashlib.sha256(library.read_bytes()).hexdigest()[:32]}.so'


def _compile(source: Path, compiler: str, openmp: Path | None, scratch: Path) -> Path:
    """Compile in ``scratch``; returns the library there."""
    part, built = scratch / 'part.o', scratch / 'built.so'
    flags = [*_FLAGS, '-fopenmp' if openmp else '-fopenmp-simd']
    link = [str(openmp), f'-Wl,-rpath,{openmp.parent}'] if openmp else []
    for command in (
        [compiler, *flags, '-c', str(source), '-o', str(part)],
        [compiler, '-shared', str(part), *link, '-lm', '-o', str(built)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise OSError(f'{compiler}: {done.stderr.strip()}')
    return built


def _openmp_library() -> Path | None:
    """The OpenMP runtime that torch has loaded: threads of a second one would compete with it."""
    root = Path(torch.__file__).parent
    found = [*root.glob('lib/libgomp*.so*'), *root.parent.glob('torch.libs/libgomp*.so*')]
    return sorted(found)[0] if found else None


def _processor() -> str:
    """Processor that ``-march=native`` compiles for: machines may share a cache folder."""
    info = Path('/proc/cpuinfo')
    if info.is_file():
        lines = info.read_text().splitlines()
        return next((line for line in lines if line.startswith('flags')), platform.machine())
    return f'{platform.machine()} {platform.processor()} {platform.node()}'
