# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Write what `python -m gplq_mm recipe` prints for every preset, and the values in it."""

import contextlib
import io
import json
import runpy
import sys

import yaml

BITS = ('w2a2', 'w2a4', 'w3a3', 'w4a4', 'w4a8', 'w8a8')
PRESETS = ('auto', 'gplq_w3a3_paper', 'gplq_w4a4_paper', *BITS, *(f'{name}_v1' for name in BITS))


def printed(*arguments: str) -> str:
    """Standard output of `python -m gplq_mm ARGUMENTS`.

    Raises:
        RuntimeError: If the command fails.
    """
    output = io.StringIO()
    sys.argv = ['gplq_mm', *arguments]
    with contextlib.redirect_stdout(output):
        try:
            runpy.run_module('gplq_mm', run_name='__main__', alter_sys=True)
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(f'{" ".join(arguments)}: exit code {stop.code}') from stop
    return output.getvalue()


def main(path: str) -> None:
    texts = {name: printed('recipe', name) for name in PRESETS}
    results = {
        'values': {name: yaml.safe_load(text) for name, text in texts.items()},
        'yaml_texts': texts,
        'python_texts': {name: printed('recipe', name, '--format', 'python') for name in PRESETS},
    }
    with open(path, 'w', encoding='utf-8') as file:
        json.dump(results, file)


if __name__ == '__main__':
    main(sys.argv[1])
