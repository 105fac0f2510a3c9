# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The stage-1 benchmark: its rows, its rule for saved bytes, its engines."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('mmpretrain')

TOOLS = Path(__file__).parents[2] / 'tools' / 'benchmarks'
KEYS = {'model', 'engine', 'teacher', 'device', 'batch', 'threads', 'step_ratio'}
KEYS |= {'saved_bytes_per_image', 'saved_ratio', 'peak_memory_bytes'}


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import stage1

    return stage1


def test_rows_and_chart_of_a_small_run(tool, monkeypatch, tmp_path) -> None:
    import stage1_models

    small = lambda: stage1_models._vit_blocks(1)  # noqa: E731
    monkeypatch.setitem(tool.WORKLOADS, 'vit_blocks_197x192', small)
    out = tmp_path / 'stage1.json'
    arguments = ['vit_blocks_197x192', '--batch', '1', '--size', '1', '17', '--steps', '1']
    arguments += ['--warmup', '0', '--no-peak', '--device', 'cpu', '--out', str(out)]
    monkeypatch.setattr(sys, 'argv', ['stage1.py', *arguments])
    threads = torch.get_num_threads()
    tool.main()
    assert torch.get_num_threads() == threads
    report = json.loads(out.read_text())
    rows = {(row['engine'], row['teacher']): row for row in report['rows']}
    assert len(rows) == 7 and all(set(row) >= KEYS for row in rows.values())
    saved = {key: row['saved_ratio'] for key, row in rows.items()}
    assert saved['float', False] == 1
    assert saved['fused', False] < 0.6 < 1 < saved['torchao', False] <= saved['reference', False]
    assert all(row['step_ratio'] > 0 for row in rows.values())
    one, two, four, wide = report['slopes']['vit_blocks_197x192']['fused']
    assert four - two == 2 * (two - one) and wide <= 2 * one
    assert out.with_suffix('.png').stat().st_size > 0
    again = tool.merged(report['rows'], [dict(rows['float', False])])
    assert len(again) == 1  # a run replaces the rows of its model, device, batch and threads


def test_torchao_quantizes_to_the_same_values(tool) -> None:
    from stage1_models import TorchAOQuantizer

    from gplq_mm.quantizers import FakeQuantizer, QuantSpec

    quantizer = FakeQuantizer(QuantSpec(learn_scale=True))
    quantizer.set_qparams(torch.tensor(0.25), torch.tensor(1.0))
    x = torch.randn(100)
    expected = quantizer(x)
    quantizer.__class__ = TorchAOQuantizer
    torch.testing.assert_close(quantizer(x), expected)


def test_unknown_model_in_one_line(tool) -> None:
    with pytest.raises(SystemExit, match='neither a config nor one of vit_blocks_197x192'):
        tool.find_workload('nothing', tool.parse_args(['nothing']))
