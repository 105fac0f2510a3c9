# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The inference benchmark: rows, reasons, its processes, and its command line."""

import json
from pathlib import Path

import pytest

pytest.importorskip('mmpretrain')

TOOLS = Path(__file__).parents[2] / 'tools' / 'benchmarks'
KEYS = {'model', 'size', 'backend', 'bits', 'scope', 'batch', 'threads', 'isa', 'latency_ms'}
KEYS |= {'ratio_fp32', 'peak_memory_bytes', 'file_bytes', 'metric', 'value', 'equals_simulation'}


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import inference

    return inference


def test_one_process_a_backend_gives_rows_chart_and_reasons(tool, tmp_path, monkeypatch) -> None:
    import inference_backends
    import inference_group

    monkeypatch.setattr(inference_group, 'TURN_SECONDS', 0.0)
    no_flag = lambda flags: 'the processor has no bf16'  # noqa: E731
    monkeypatch.setattr(inference_backends, 'no_bf16', no_flag)
    out = tmp_path / 'inference.json'
    arguments = ['vit_s_224', '--backends', 'torch', 'torch bf16', 'simulated', 'integer']
    arguments += ['--batch', '1', '--rounds', '1', '--images', '2', '--out', str(out)]
    tool.main([*arguments, '--work-dir', str(tmp_path / 'files')])
    rows = {row['backend']: row for row in json.loads(out.read_text())['rows']}
    assert len(rows) == 4 and all(set(row) >= KEYS for row in rows.values())
    assert rows['torch']['ratio_fp32'] == 1 and rows['torch']['bits'] == 'fp32'
    assert rows['torch bf16']['latency_ms'] is None
    assert rows['torch bf16']['reason'] == 'the processor has no bf16'
    integer = rows['integer']
    assert integer['equals_simulation'] is True and integer['equal_images'] == 2
    assert integer['bits'] == 'w4a4' and integer['weights'] == 'random'
    assert integer['file_bytes'] < rows['simulated']['file_bytes'] / 5
    assert integer['latency_ms'] > 0 and integer['peak_memory_bytes'] > 2**20
    assert out.with_suffix('.png').stat().st_size > 0
    again = tool.merged(list(rows.values()), [dict(integer)])
    assert len(again) == 1  # a run replaces the rows of its model, batch size and threads


def test_a_stopped_run_goes_on_in_the_order_of_worth(tool, tmp_path, monkeypatch) -> None:
    measured = []

    class Group:
        def __init__(self, folder, about, backends, threads, progress) -> None:
            self.group = about['name'], threads

        def run(self, rounds, check, score):
            if len(measured) == 3:
                raise KeyboardInterrupt
            measured.append(self.group)
            return {name: Measured(seconds={1: [0.1], 8: [0.8]}) for name in backends}

    from inference_group import Measured

    backends = ['torch', 'integer']
    about = {'size': [8, 8], 'weights': 'random', 'task': 'classifier', 'config': None}
    monkeypatch.setattr(tool, 'Group', Group)
    monkeypatch.setattr(
        tool, 'prepared', lambda name, a: (tmp_path, {**about, 'name': name, 'batches': [1, 8]})
    )
    command = ['vit_s_224', 'swin_t_224', '--threads', '1', '2', '--backends', *backends]
    command += ['--out', str(tmp_path / 'rows.json'), '--resume']
    with pytest.raises(KeyboardInterrupt):
        tool.main(command)
    assert measured == [('vit_s_224', 1), ('swin_t_224', 1), ('vit_s_224', 2)]
    measured.clear()
    tool.main(command)
    assert measured == [('swin_t_224', 2)]
    assert len(json.loads((tmp_path / 'rows.json').read_text())['rows']) == 16
    with pytest.raises(SystemExit, match='--out FILE'):
        tool.main(['vit_s_224', '--resume'])


def test_a_failing_process_becomes_a_reason(tool, tmp_path) -> None:
    from inference_group import Group

    about = {'name': 'x', 'batches': [1], 'reasons': {'our_onnx': 'no exporter'}, 'images': 1}
    (tmp_path / 'case.json').write_text(json.dumps(about))
    group = Group(tmp_path, about, ['onnxruntime', 'our ONNX'], 1, progress=lambda text: None)
    measured = group.run(rounds=1, check=True, score=False)
    assert measured['our ONNX'].reason == 'no exporter'
    assert 'the process ended with code 1' in measured['onnxruntime'].reason
    assert measured['onnxruntime'].median(1) is None


def test_warns_where_float_is_faster(tool) -> None:
    from inference_group import Measured
    from inference_table import WARNING, rows_of, table

    about = {'name': 'm', 'size': [8, 8], 'batches': [1], 'weights': 'random', 'task': 'classifier'}
    about |= {'bits': 'w4a4', 'scope': 'all'}
    measured = {
        'torch': Measured(seconds={1: [0.4, 0.4, 0.4]}),
        'onnxruntime': Measured(seconds={1: [0.1]}),
        'integer': Measured(seconds={1: [0.2]}),
        'our ONNX': Measured(reason='not there'),
    }
    rows = {row['backend']: row for row in rows_of(about, measured, 1, 'AVX2')}
    integer = rows['integer']
    assert integer['ratio_fp32'] == pytest.approx(2) and integer['best_float'] == 'onnxruntime'
    assert integer['ratio_best_float'] == pytest.approx(0.5) and integer['advice'] == WARNING
    assert rows['torch']['advice'] == ''
    text = table(list(rows.values()))
    assert text.count(WARNING) == 1 and 'not available: not there' in text


def test_percentile_and_flags(tool, tmp_path) -> None:
    from inference_group import Measured
    from inference_machine import isa, no_bf16, processor_flags

    assert Measured(seconds={1: [float(i) for i in range(100)]}).p95(1) == 95.0
    path = tmp_path / 'cpuinfo'
    path.write_text('model name : x\nflags\t\t: fpu avx2 avx512f amx_bf16\n')
    flags = processor_flags(path)
    assert isa(flags) == 'AVX2+AVX-512+AMX-BF16' and no_bf16(flags) == ''
    assert 'has no' in no_bf16({'avx2'})


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('nothing', 'nothing: write one of vit_s_224'),
        ('', 'name a model'),
        ('--config c.py', 'belong together'),
        ('--config c.py --checkpoint x.pth', 'c.py does not exist'),
        ('vit_s_224 --threads 0', 'positive numbers'),
        ('vit_s_224 --recipe w1a1', '--recipe'),
        ('--table', '--table prints'),
    ],
)
def test_mistakes_are_one_line(tool, words, message) -> None:
    with pytest.raises(SystemExit, match=message):
        tool.main(words.split())
