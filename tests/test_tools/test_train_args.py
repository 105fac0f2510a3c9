# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from gplq_mm.integrations.mm.launch.errors import ConfigError
from gplq_mm.integrations.mm.launch.tools import USER_ERROR, run_tool
from tests.helpers.tiny_projects import TinyProject, make_project
from tests.helpers.tools import load_tool

pytest.importorskip('mmpretrain')
train = load_tool('train')
WORDS = (
    'c.py --work-dir w --amp --auto-scale-lr --resume --launcher pytorch --local-rank 1 '
    '--cfg-options a.b=1 c=[1,2]'
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyProject:
    monkeypatch.chdir(tmp_path)
    made = make_project(tmp_path, 'vit_classifier')
    text = "_base_ = './vit_classifier.py'\nmodel = dict(type='gplq_mm.GPLQ', float_type='X')\n"
    made.config.with_name('gplq.py').write_text(text)
    return made


def test_arguments_that_mm_users_know() -> None:
    args = train.parse_args(WORDS.split())
    assert (args.config, args.work_dir, args.resume) == ('c.py', 'w', 'auto')
    assert args.launcher == 'pytorch'
    assert args.amp
    assert args.auto_scale_lr
    assert args.local_rank == 1
    assert args.cfg_options == {'a.b': 1, 'c': [1, 2]}


@pytest.mark.parametrize(
    ('words', 'resume'), [('', None), ('--resume', 'auto'), ('--resume x.pth', 'x.pth')]
)
def test_resume_takes_a_path_or_nothing(words: str, resume: str | None) -> None:
    assert train.parse_args(['c.py', *words.split()]).resume == resume


def test_amp_on_a_cpu_needs_our_constructor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, 'get_device', lambda: 'cpu')
    with pytest.raises(ConfigError, match='--amp: MMEngine has mixed precision on accelerators'):
        train.set_amp(Config(dict(optim_wrapper=dict())))
    cfg = Config(dict(optim_wrapper=dict(constructor=train.CONSTRUCTOR)))
    train.set_amp(cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'


def test_amp_keeps_the_constructor_and_the_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, 'get_device', lambda: 'cuda')
    cfg = Config(dict(optim_wrapper=dict(constructor='gplq_mm.X', loss_scale=512.0)))
    train.set_amp(cfg)
    assert cfg.optim_wrapper == dict(
        type='AmpOptimWrapper', constructor='gplq_mm.X', loss_scale=512.0
    )


def test_auto_scale_lr_needs_the_batch_size_of_the_learning_rate() -> None:
    with pytest.raises(ConfigError, match='base_batch_size=16'):
        train.set_auto_scale_lr(Config(dict()))
    cfg = Config(dict(auto_scale_lr=dict(base_batch_size=16)))
    train.set_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr.enable


@pytest.mark.parametrize(
    ('words', 'names'),
    [
        ('configs/nope.py', 'no config at {root}/configs/nope.py'),
        ('configs/gplq.py', 'load_from=PATH_OR_URL'),
        ('configs/gplq.py --cfg-options load_from=nope.pth', '{root}/nope.pth'),
        ('configs/gplq.py --cfg-options load_from=cut.pth', 'cut.pth is truncated'),
        ('configs/gplq.py --cfg-options load_from=quantized.pth', 'quantized already'),
        ('configs/gplq.py --cfg-options data_root=/nowhere', '/nowhere'),
        ('configs/gplq.py --resume nope.pth', '{root}/nope.pth'),
        ('configs/vit_classifier.py --cfg-options load_from=nope.pth', '{root}/nope.pth'),
        ('configs/vit_classifier.py --auto-scale-lr', 'base_batch_size'),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    project: TinyProject, capfd: pytest.CaptureFixture[str], words: str, names: str
) -> None:
    torch.save(dict(state_dict=dict(x=torch.ones(1000))), 'whole.pth')
    Path('cut.pth').write_bytes(Path('whole.pth').read_bytes()[:2000])
    state = {'a.input_quantizer.scale': torch.ones(())}
    torch.save(dict(state_dict=state), 'quantized.pth')
    assert run_tool(lambda: train.main(words.split())) == USER_ERROR
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('error: ')
    assert names.format(root=project.root) in error
    assert not (project.root / 'work_dirs').exists()
