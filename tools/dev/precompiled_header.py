# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Stand in front of a C++ compiler and compile with a precompiled header.

Each of mmcv's 77 source files begins with ``pytorch_cpp_helper.hpp``, which includes torch's
headers: three quarters of the time of each compilation. The first call compiles this header, with
exactly the flags of its own file; calls after that read the result (GCC and clang look for
``X.gch`` where ``-include X`` is given). Calls in between, calls that do not compile exactly one
file, and calls of a compiler that refuses the header go to the compiler unchanged.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

HEADER = 'pytorch_cpp_helper.hpp'
SUFFIXES = ('.cpp', '.cc')
WITH_VALUE = ('-MF', '-o')  # followed by the name of a file to write


def language_flags(argv: list[str]) -> list[str] | None:
    """Return the arguments that a precompiled header depends on, in their order.

    Args:
        argv: Arguments of a call of the compiler.

    Returns:
        The arguments without input and outputs; None if the call does not compile exactly one file.
    """
    values = {index + 1 for index, word in enumerate(argv) if word in WITH_VALUE}
    words = [word for index, word in enumerate(argv) if index not in values]
    sources = [word for word in words if word.endswith(SUFFIXES)]
    if '-c' not in words or len(sources) != 1:
        return None
    return [word for word in words if word not in ('-c', '-MMD', *WITH_VALUE, *sources)]


def find_header(flags: list[str]) -> Path | None:
    """Return the header's path in the folders of ``-I``, as the compiler would find it."""
    folders = (Path(flag[2:]) for flag in flags if flag.startswith('-I'))
    return next((folder / HEADER for folder in folders if (folder / HEADER).is_file()), None)


def precompile(compiler: list[str], flags: list[str], header: Path, folder: Path) -> None:
    """Write ``folder/HEADER`` and beside it the precompiled form, if the compiler makes one.

    Creating the folder is the lock: one call precompiles, the others return at once.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return
    stub, unfinished = folder / HEADER, folder / 'unfinished'
    stub.write_text(f'#include "{header.resolve()}"\n', encoding='utf-8')
    command = [*compiler, *flags, '-x', 'c++-header', str(stub), '-o', str(unfinished)]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0:
        unfinished.rename(f'{stub}.gch')


def compile_file(compiler: list[str], cache: Path, argv: list[str]) -> int:
    """Run the compiler, with the precompiled header where there is one; return its exit code."""
    flags = language_flags(argv)
    header = find_header(flags) if flags is not None else None
    if flags is not None and header is not None:
        folder = cache / hashlib.sha256(shlex.join([*compiler, *flags]).encode()).hexdigest()[:16]
        precompile(compiler, flags, header, folder)
        if Path(f'{folder / HEADER}.gch').exists():
            command = [*compiler, '-include', str(folder / HEADER), *argv]
            if subprocess.run(command, check=False).returncode == 0:
                return 0
    return subprocess.run([*compiler, *argv], check=False).returncode


def write_launcher(folder: Path, compiler: str) -> Path:
    """Write an executable that stands for a compiler; return its path.

    Args:
        folder: Gets the executable and the precompiled header; temporary.
        compiler: The compiler's command, such as ``g++`` or ``ccache clang++``.
    """
    words = shlex.split(compiler)
    launcher = folder / Path(words[-1]).name
    command = shlex.join([sys.executable, '-I', '-S', os.path.abspath(__file__), str(folder)])
    launcher.write_text(
        f'#!/bin/sh\nexec {command} {len(words)} {shlex.join(words)} "$@"\n', encoding='utf-8'
    )
    launcher.chmod(0o755)
    return launcher


def main(argv: list[str]) -> int:
    """Run ``FOLDER N COMPILER_WORD_1 ... COMPILER_WORD_N ARGUMENT ...`` of the launcher."""
    folder, number, words = argv[0], int(argv[1]), argv[2:]
    return compile_file(words[:number], Path(folder) / 'headers', words[number:])


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
