# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import importlib.util
from pathlib import Path

import pytest

pytest.importorskip('mmengine', reason='needs mmengine')

SCRIPT = Path(__file__).resolve().parents[2] / 'tools/demo.py'
SPEC = importlib.util.spec_from_file_location('demo', SCRIPT)
demo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(demo)


def part(ap):
    metrics = {'coco/bbox_mAP': ap, 'coco/segm_mAP': ap / 2}
    return dict(
        metrics=metrics, model_bytes=5 * 2**20, bops=2e9, seconds=61.0, peak_memory_bytes=3e8
    )


def test_table_has_a_column_a_model_and_percent():
    table = demo.comparison({'fp32': part(0.6), 'stage1': part(0.5), 'stage2': part(0.4)})
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in table.splitlines()]
    assert rows[0] == ['', 'FP32', 'W32A4', 'W4A4']
    assert rows[2] == ['box AP', '60.0', '50.0', '40.0']
    assert rows[3] == ['mask AP', '30.0', '25.0', '20.0']
    assert rows[4] == ['size (MiB)', '5.00', '5.00', '5.00']


def test_failing_step_stops_with_its_number_code_and_command(capfd):
    with pytest.raises(SystemExit, match=r'^demo: step 3/5 failed with exit code 7: python -c '):
        demo.run(3, '-c', 'import sys; sys.exit(7)')
    assert "$ python -c 'import sys; sys.exit(7)'" in capfd.readouterr().out


def test_float_model_is_kept_until_its_config_changes(tmp_path, monkeypatch, capfd):
    trainings = []

    def train(number, *command):
        trainings.append(command)
        (tmp_path / 'epoch_1.pth').touch()
        (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))

    monkeypatch.setattr(demo, 'run', train)
    assert demo.train_float(tmp_path) == tmp_path / 'epoch_1.pth'
    assert demo.train_float(tmp_path) == tmp_path / 'epoch_1.pth'
    assert len(trainings) == 1
    assert 'already trained' in capfd.readouterr().out
    monkeypatch.setattr(demo, 'fingerprint', lambda: 'of another config')
    demo.train_float(tmp_path)
    (tmp_path / 'epoch_1.pth').unlink()
    demo.train_float(tmp_path)
    assert len(trainings) == 3


def test_quantization_without_a_report_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, 'run', lambda *args: None)
    (tmp_path / 'gplq_report.json').write_text('{"of": "an earlier run"}')
    with pytest.raises(SystemExit, match=r'step 3/5 left no .*gplq_report.json'):
        demo.quantize(tmp_path, Path('float.pth'))
