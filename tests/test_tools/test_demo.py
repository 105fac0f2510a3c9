# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import sys
from pathlib import Path

import pytest

pytest.importorskip('mmengine', reason='needs mmengine')

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
sys.path.insert(0, str(TOOLS))
try:
    import demo
finally:
    sys.path.remove(str(TOOLS))


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


class FakeDemo:
    """Writes down the commands, and does what the trainings leave."""

    def __init__(self, folder):
        self.folder, self.commands, self.log = folder, [], folder / 'demo.log'

    def run(self, command, phases):
        self.commands.append([str(word) for word in command])
        (self.folder / 'epoch_1.pth').touch()
        (self.folder / 'last_checkpoint').write_text(str(self.folder / 'epoch_1.pth'))

    def skip(self, title, reason):
        self.reason = reason


def test_float_model_is_kept_until_its_config_changes(tmp_path, monkeypatch):
    fake = FakeDemo(tmp_path)
    monkeypatch.chdir(TOOLS.parent)
    assert demo.train_float(fake, tmp_path) == tmp_path / 'epoch_1.pth'
    assert demo.train_float(fake, tmp_path) == tmp_path / 'epoch_1.pth'
    assert len(fake.commands) == 1
    assert 'already trained' in fake.reason
    monkeypatch.setattr(demo, 'fingerprint', lambda: 'of another config')
    demo.train_float(fake, tmp_path)
    (tmp_path / 'epoch_1.pth').unlink()
    demo.train_float(fake, tmp_path)
    assert len(fake.commands) == 3


def test_quantization_without_a_report_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(TOOLS.parent)
    (tmp_path / 'gplq_report.json').write_text('{"of": "an earlier run"}')
    with pytest.raises(SystemExit, match=r'left no .*gplq_report.json'):
        demo.quantize(FakeDemo(tmp_path), tmp_path, Path('float.pth'))


@pytest.mark.parametrize(('processes', 'batch'), [(1, None), (2, 2), (4, 1)])
def test_processes_share_the_batch_of_the_config(processes, batch, tmp_path, monkeypatch):
    monkeypatch.chdir(TOOLS.parent)
    monkeypatch.setattr(demo, 'num_processes', lambda: processes)
    command = [str(word) for word in demo.train_command(demo.FLOAT_CONFIG, tmp_path, 'a=1')]
    options = command[command.index('--cfg-options') + 1 :]
    sizes = [word for word in options if word.startswith('train_dataloader.batch_size=')]
    assert sizes == ([f'train_dataloader.batch_size={batch}'] if batch else [])
    assert ('--launcher' in command) is (processes > 1)
    assert 'a=1' in options


def test_files_are_listed_with_their_bytes(tmp_path):
    (tmp_path / 'gplq_packed.pth').write_bytes(bytes(1234))
    (text,) = demo.files(tmp_path).splitlines()
    assert text.split()[:2] == ['1,234', 'bytes']


LINES = [
    'Load checkpoint from float.pth',
    'calibration by layer: 4/8 backbone.layers.2, 9 s left',
    'FP32: evaluated 50/100 batches',
    'Checkpoints will be saved to /x.',
    'Epoch(train) [1][125/250]  lr: 1e-5',
    'Epoch(val) [1][100/100]  eta: 0:00:00',
    'stage 2: 32 images',
    'stage 2: 7/7 backbone.layers.5, 3 s left',
    'stage 2: evaluated 100/100 batches',
]


def test_lines_of_a_run_begin_the_phases_and_fill_their_bars():
    first, stage1, stage2 = demo.QUANTIZATION
    begun = [[phase.title for phase in (stage1, stage2) if demo_begins(phase, x)] for x in LINES]
    assert begun[3] == [stage1.title]
    assert begun[6] == [stage2.title]
    assert sum(map(len, begun)) == 2
    assert [first.fraction(line) for line in LINES[:3]] == [None, 0.3, 0.75]
    assert stage1.fraction(LINES[4]) == 0.45
    assert stage1.fraction(LINES[5]) == 1.0
    assert stage2.fraction(LINES[6]) is None
    assert stage2.fraction(LINES[7]) == 0.4
    assert stage2.fraction(LINES[8]) == 0.7


def demo_begins(phase, line):
    return sys.modules['demo_progress'].begins(phase, line)
