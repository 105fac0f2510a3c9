# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import argparse
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from gplq_mm.convert import resolve_recipe
from gplq_mm.integrations.mm.launch import tools
from gplq_mm.integrations.mm.launch.errors import ConfigError
from gplq_mm.integrations.mm.launch.tools import (
    USER_ERROR,
    add_arguments,
    load_config,
    read_config,
    run_tool,
    set_resume,
)
from gplq_mm.quantizers import FakeQuantizer, QuantSpec


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')
    (tmp_path / 'net.py').write_text(
        "data_root = 'data/'\nann = data_root + 'a.json'\nx = dict(y=1)"
    )
    return tmp_path


def test_read_config_takes_the_work_dir_from_the_file_name(folder: Path) -> None:
    cfg = read_config(parse('net.py'))
    assert (cfg.work_dir, cfg.launcher) == ('work_dirs/net', 'none')


def test_read_config_applies_arguments_and_moves_the_data_root(folder: Path) -> None:
    options = ['--cfg-options', 'data_root=/mnt/d', 'x.y=2']
    cfg = read_config(parse('net.py', '--work-dir', 'w', '--launcher', 'mpi', *options))
    assert (cfg.work_dir, cfg.launcher, cfg.x.y) == ('w', 'mpi', 2)
    assert (cfg.data_root, cfg.ann) == ('/mnt/d/', '/mnt/d/a.json')


def test_dataloader_defaults_follow_the_command_line(folder: Path) -> None:
    (folder / 'cls.py').write_text(
        "default_scope = 'mmpretrain'\ntrain_dataloader = dict(num_workers=4)"
    )
    assert read_config(parse('cls.py')).train_dataloader.persistent_workers is True
    option = 'train_dataloader.num_workers=0'
    cfg = read_config(parse('cls.py', '--cfg-options', option))
    assert cfg.train_dataloader.persistent_workers is False


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        (None, 'no config at'),
        ("_base_ = './gone.py'", r'builds on a config that does not exist: .*gone\.py'),
        ("_base_ = 'mmocr::a/a.py'", 'python -m gplq_mm doctor'),
        ("custom_imports = dict(imports=['no_such_module'])", 'python -m gplq_mm doctor'),
    ],
)
def test_a_config_that_cannot_be_read_is_one_line(
    folder: Path, text: str | None, says: str
) -> None:
    if text is not None:
        (folder / 'bad.py').write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_config('bad.py')
    assert '\n' not in str(caught.value)


def test_resume_finds_the_latest_checkpoint_also_after_a_move(folder: Path) -> None:
    (folder / 'w').mkdir()
    torch.save({'state_dict': {}}, folder / 'w' / 'epoch_1.pth')
    (folder / 'w' / 'last_checkpoint').write_text('/was/there/epoch_1.pth')
    cfg = Config(dict(work_dir='w', load_from='fp32.pth'))
    assert set_resume(cfg, 'auto') is None
    assert (cfg.resume, cfg.load_from) == (True, 'w/epoch_1.pth')


def test_resume_with_nothing_there_starts_from_load_from(folder: Path) -> None:
    cfg = Config(dict(work_dir='w', load_from='fp32.pth'))
    warning = set_resume(cfg, 'auto')
    assert warning == '--resume: no checkpoint in w; starting from fp32.pth'
    assert (cfg.resume, cfg.load_from) == (False, 'fp32.pth')


def test_no_resume_changes_nothing() -> None:
    cfg = Config(dict(work_dir='w', load_from='fp32.pth', resume=False))
    assert set_resume(cfg, None) is None
    assert cfg.load_from == 'fp32.pth'


def test_resume_from_what_is_gone_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r'x\.pth'):
        set_resume(Config(dict(work_dir='w')), 'x.pth')
    (folder / 'w').mkdir()
    (folder / 'w' / 'last_checkpoint').write_text('w/epoch_1.pth')
    with pytest.raises(ConfigError, match='which does not exist; .* write --resume CHECKPOINT'):
        set_resume(Config(dict(work_dir='w')), 'auto')


def refuse_config() -> None:
    raise ConfigError('a')


def refuse_recipe() -> None:
    resolve_recipe('w4a5')


def refuse_uncalibrated() -> None:
    FakeQuantizer(QuantSpec(num_bits=4))(torch.ones(2))


@pytest.mark.parametrize('refuse', [refuse_config, refuse_recipe, refuse_uncalibrated])
def test_what_this_package_refuses_is_one_line(
    capsys: pytest.CaptureFixture[str], refuse: object
) -> None:
    assert callable(refuse)
    assert run_tool(refuse) == USER_ERROR
    assert capsys.readouterr().err.startswith('error: ')


def fail_in_torch() -> None:
    torch.ones(2).reshape(3)


def fail_here() -> None:
    raise ValueError('an accident')


def fail_by_accident_in_the_package() -> None:
    FakeQuantizer(QuantSpec(num_bits=4)).set_qparams(None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize('fail', [fail_in_torch, fail_here, fail_by_accident_in_the_package])
def test_what_nobody_refused_keeps_its_traceback(fail: object) -> None:
    assert callable(fail)
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        run_tool(fail)
    assert not isinstance(caught.value, ConfigError)


def test_success_is_exit_code_0() -> None:
    assert run_tool(lambda: None) == 0


def test_a_library_that_the_model_names_must_be_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(tools, 'check_versions', lambda *names: asked.append(names))
    (folder / 'net.py').write_text(
        "default_scope = 'mmdet'\nmodel = dict(backbone=dict(type='mmpretrain.ViTSAM'))"
    )
    read_config(parse('net.py'))
    assert asked == [(), ('mmcv', 'mmdet', 'mmpretrain')]
