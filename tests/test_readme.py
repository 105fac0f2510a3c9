# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""README is short and has the stored figures; its commands and those of the how-to pages parse."""

import json
import re
import shlex
import statistics
from pathlib import Path

import pytest

from tests.helpers.tools import load_tool

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / 'README.md'
MOST_LINES = 120
PAGES = [README, *sorted((ROOT / 'docs/how_to').glob('*.md'))]
FENCE = re.compile(r'^```(?:bash|shell)\n(.*?)^```$', re.M | re.S)


def rows(name: str, **wanted: object) -> list[dict]:
    """Stored rows of a benchmark that have these values."""
    content = json.loads((ROOT / 'docs/benchmarks' / f'{name}.json').read_text())
    found = content if isinstance(content, list) else content['rows']
    return [row for row in found if wanted.items() <= row.items()]


def commands(page: Path) -> list[str]:
    """Commands of a page's blocks."""
    code = '\n'.join(FENCE.findall(page.read_text(encoding='utf-8')))
    return [line for line in code.replace('\\\n', ' ').splitlines() if line.strip()]


def cells() -> dict[str, list[str]]:
    """The table's rows by their first cell."""
    table = README.read_text(encoding='utf-8').split('|---|\n')[1].split('\n\n')[0]
    parts = [[c.strip(' *') for c in line.strip('|').split('|')] for line in table.splitlines()]
    return {name: rest for name, *rest in parts}


def deployed(backend: str, bits: str) -> list[str]:
    """File and latency of ViT-S."""
    wanted = dict(model='vit_s_224', backend=backend, bits=bits, batch=1, threads=1)
    (row,) = rows('inference', **wanted)
    return [f'{row["file_bytes"] / 2**20:.1f} MiB', f'{row["latency_ms"]:.1f} ms']


def saved(engine: str) -> str:
    """Memory of training ViT-S, relative to float."""
    (row,) = rows('stage1', model='vit_s_224', engine=engine, teacher=False, device='cpu')
    return f'{row["saved_ratio"]:.2f} x'


def test_the_figures_are_the_stored_ones() -> None:
    wanted = dict(model='dinov2_s14_flowers17', recipe='ours', bits='w4a4')
    means = {
        stage: f'{statistics.mean(row[stage] for row in rows("accuracy", **wanted)):.2f}'
        for stage in ('fp32', 'stage2')
    }
    assert cells() == {
        'FP32, torch': [means['fp32'], *deployed('torch', 'fp32'), saved('float')],
        'FP32, OpenVINO': [means['fp32'], *deployed('OpenVINO', 'fp32'), '-'],
        'int8, onnxruntime dynamic': [
            'not measured', *deployed('onnxruntime int8 dynamic', 'w8a8'), '-'
        ],
        "QAT by torch.ao's fake quantization": ['not measured', '-', '-', saved('torchao')],
        'gplq_mm, W4A4': [means['stage2'], *deployed('integer', 'w4a4'), saved('fused')],
    }  # fmt: skip


def test_it_is_short() -> None:
    assert len(README.read_text(encoding='utf-8').splitlines()) <= MOST_LINES


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_commands_parse_and_name_files_that_are_there(page: Path) -> None:
    pytest.importorskip('mmdet')
    reference = load_tool('dev/write_tools_reference')
    for line in commands(page):
        words = shlex.split(line, comments=True)
        for config in re.findall(r'(?<!\S)configs/\S+\.py', line):
            assert (ROOT / config).is_file(), line
        if words[:3] == ['python', '-m', 'gplq_mm']:
            reference.command_parser(words[3]).parse_args(words[4:])
        elif words[0] == 'python':
            tool = words[1].removeprefix('tools/').removesuffix('.py')
            reference.parser_of(tool).parse_args(words[2:])
        else:
            assert words[0] in ('make', 'pip', 'bash'), line
            assert words[0] != 'bash' or (ROOT / words[1]).is_file(), line
