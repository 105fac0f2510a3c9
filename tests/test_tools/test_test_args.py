# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
from pathlib import Path

import pytest
import torch

from gplq_mm.integrations.mm.launch.tools import USER_ERROR, run_tool
from tests.helpers.tiny_projects import make_project
from tests.helpers.tools import load_tool

pytest.importorskip('mmpretrain')
test_tool = load_tool('test')
WORDS = (
    'c.py x.pth --work-dir w --out o.pkl --show --show-dir s --wait-time 0.5 --tta '
    '--launcher slurm --local_rank 1 --cfg-options a=b'
)


def test_arguments_that_mm_users_know() -> None:
    args = test_tool.parse_args(WORDS.split())
    assert (args.config, args.checkpoint, args.work_dir) == ('c.py', 'x.pth', 'w')
    assert (args.out, args.out_item, args.show_dir, args.wait_time) == ('o.pkl', 'pred', 's', 0.5)
    assert args.show
    assert args.tta
    assert (args.launcher, args.local_rank, args.cfg_options) == ('slurm', 1, {'a': 'b'})


@pytest.mark.parametrize(
    ('words', 'names'),
    [
        ('configs/vit_classifier.py nope.pth', '{root}/nope.pth'),
        ('configs/vit_classifier.py text.pth', 'text.pth cannot be read as a checkpoint'),
        ('configs/vit_classifier.py quantized.pth', 'quantized.pth is quantized, but the model'),
        ('configs/vit_classifier.py nope.pth --out o.txt', '--out o.txt'),
        ('configs/vit_classifier.py nope.pth --out o.txt --out-item metrics', '.json'),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: str,
    names: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path, 'vit_classifier')
    Path('text.pth').write_text('no checkpoint')
    state = {'head.input_quantizer.scale': torch.ones(())}
    torch.save(dict(state_dict=state), 'quantized.pth')
    assert run_tool(lambda: test_tool.main(words.split())) == USER_ERROR
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('error: ')
    assert names.format(root=tmp_path) in error
