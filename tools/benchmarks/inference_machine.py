# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What the processor and its tools can do, read when the benchmark runs."""

import platform
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

_NAMES = {
    'avx2': 'AVX2',
    'avx512f': 'AVX-512',
    'avx_vnni': 'AVX-VNNI',
    'avx512_vnni': 'AVX-512-VNNI',
    'avx512_bf16': 'AVX-512-BF16',
    'amx_int8': 'AMX-INT8',
    'amx_bf16': 'AMX-BF16',
    'asimd': 'NEON',
    'asimddp': 'DotProd',
    'i8mm': 'I8MM',
    'bf16': 'BF16',
}
BF16_FLAGS = ('avx512_bf16', 'amx_bf16', 'bf16')


def processor_flags(path: Path = Path('/proc/cpuinfo')) -> set[str]:
    """Instruction sets that the kernel reports; those of the platform elsewhere."""
    if not path.is_file():
        return {'asimd'} if platform.machine() in ('arm64', 'aarch64') else set()
    found = re.search(r'^(?:flags|Features)\s*:\s*(.*)$', path.read_text(), re.M)
    return set(found.group(1).split()) if found else set()


def isa(flags: set[str]) -> str:
    """Instruction sets that matter to inference, the machine's type without any.

    Examples:
        >>> isa({'avx2', 'avx512f', 'fpu'})
        'AVX2+AVX-512'
    """
    return '+'.join(name for flag, name in _NAMES.items() if flag in flags) or platform.machine()


def no_bf16(flags: set[str]) -> str:
    """Why bfloat16 is not measured; empty if the processor multiplies it."""
    if flags.intersection(BF16_FLAGS):
        return ''
    return f'the processor has no {" or ".join(BF16_FLAGS)}'


def no_compiler() -> str:
    """Why ``torch.compile`` is not measured; empty if it finds a C++ compiler."""
    if any(shutil.which(name) for name in ('g++', 'clang++', 'c++')):
        return ''
    return 'no C++ compiler'


def not_installed(*names: str) -> str:
    """Which packages are missing, with the command that installs them; empty if none is."""
    missing = [name for name in names if find_spec(name) is None]
    return f'not installed: pip install {" ".join(missing)}' if missing else ''


def bytes_on_disk(path: Path) -> int:
    """Bytes of a file and of the files beside it that hold its weights."""
    beside = [path.with_name(f'{path.name}.data')]
    if path.suffix == '.xml':
        beside.append(path.with_suffix('.bin'))
    return sum(file.stat().st_size for file in (path, *beside) if file.is_file())


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    text = next(iter(str(error).strip().splitlines()), '')
    return f'{type(error).__name__}: {text}'[:200]
