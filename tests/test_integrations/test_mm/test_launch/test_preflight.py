# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from torch import nn

from gplq_mm.integrations.mm.launch.errors import ConfigError
from gplq_mm.integrations.mm.launch.preflight import (
    check_checkpoint,
    check_data,
    check_float_checkpoint,
    check_float_model,
    downloaded,
    is_url,
    key_mismatch,
    require_hook,
)
from gplq_mm.integrations.mm.launch.settings_check import is_gplq


def save(path: Path, **state: torch.Tensor) -> Path:
    torch.save(dict(state_dict=state), path)
    return path


@pytest.mark.parametrize('path', ['https://a.org/b.pth', 'open-mmlab://x', 's3://b/c', 'a-b://c'])
def test_is_url(path: str) -> None:
    assert is_url(path)
    assert check_checkpoint(path) == {}


@pytest.mark.parametrize('path', ['/a/b.pth', 'b.pth', 'C:/b.pth'])
def test_is_no_url(path: str) -> None:
    assert not is_url(path)


@pytest.mark.parametrize(
    ('model', 'expected'),
    [
        (dict(type='gplq_mm.GPLQ', float_type='MaskRCNN'), True),
        (dict(type='DetTTAModel', module=dict(type='gplq_mm.GPLQ')), True),
        (dict(type='MaskRCNN'), False),
        (None, False),
    ],
)
def test_is_gplq(model: dict[str, Any] | None, expected: bool) -> None:
    assert is_gplq(dict(model=model)) is expected


def test_a_good_float_checkpoint_passes(tmp_path: Path) -> None:
    path = save(tmp_path / 'a.pth', weight=torch.ones(2))
    check_float_checkpoint(path)
    assert torch.equal(check_checkpoint(path)['weight'], torch.ones(2))


@pytest.mark.parametrize('path', [None, ''])
def test_no_float_checkpoint_says_how_to_give_it(path: str | None) -> None:
    with pytest.raises(ConfigError, match='load_from=PATH_OR_URL'):
        check_float_checkpoint(path)


def test_a_missing_checkpoint_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f'{tmp_path}/a.pth.*; do that') as caught:
        check_float_checkpoint(tmp_path / 'a.pth', remedy='do that')
    assert '\n' not in str(caught.value)


def test_quantized_weights_are_no_float_models() -> None:
    check_float_model('c.py', 'a.pth', {'a.weight': torch.ones(1)})
    state = {'a.weight': torch.ones(1), 'a.input_quantizer.scale': torch.ones(())}
    with pytest.raises(ConfigError, match=r'a\.pth is quantized, but the model of c\.py is float'):
        check_float_model('c.py', 'a.pth', state)


def test_the_hook_is_added_once() -> None:
    other = dict(type='EMAHook')
    cfg = Config(dict(custom_hooks=[other]))
    for _ in range(2):
        require_hook(cfg)
        assert cfg.custom_hooks == [other, dict(type='gplq_mm.GPLQHook')]
    cfg = Config(dict(custom_hooks=[dict(type='GPLQHook', evaluate_fp32=False)]))
    require_hook(cfg)
    assert cfg.custom_hooks == [dict(type='GPLQHook', evaluate_fp32=False)]


@pytest.mark.parametrize('kept', [0.1, 0.5, 0.99])
@pytest.mark.parametrize('is_zip', [True, False])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, kept: float, is_zip: bool) -> None:
    state = dict(state_dict=dict(weight=torch.arange(5000.0)))
    torch.save(state, tmp_path / 'a.pth', _use_new_zipfile_serialization=is_zip)
    content = (tmp_path / 'a.pth').read_bytes()
    (tmp_path / 'a.pth').write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ConfigError, match=f'{tmp_path}/a.pth') as caught:
        check_float_checkpoint(tmp_path / 'a.pth')
    assert '\n' not in str(caught.value)


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / 'a.pth', weight=torch.ones(5000))
    content = bytearray(path.read_bytes())
    place = content.find(torch.ones(100).numpy().tobytes()) + 1000
    content[place] ^= 1
    path.write_bytes(content)
    assert len(torch.load(path, weights_only=True)['state_dict']['weight']) == 5000
    with pytest.raises(ConfigError, match='wrong checksum'):
        check_float_checkpoint(path)


def test_a_quantized_checkpoint_is_no_float_one(tmp_path: Path) -> None:
    path = save(tmp_path / 'a.pth', **{'fc.input_quantizer.scale': torch.ones(())})
    with pytest.raises(ConfigError, match=r'quantized already .*fc\.input_quantizer\.scale'):
        check_float_checkpoint(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / 'coco' / 'images').mkdir(parents=True)
    (tmp_path / 'coco' / 'a.json').write_text('{}')
    return tmp_path / 'coco'


def config(data: Path, **dataset: Any) -> dict[str, Any]:
    leaf = dict(
        type='CocoDataset', data_root=str(data), ann_file='a.json', data_prefix=dict(img='images/')
    )
    return dict(train_dataloader=dict(dataset={**leaf, **dataset}))


@pytest.mark.parametrize(
    'changes',
    [
        dict(),
        dict(ann_file=''),
        dict(data_prefix='images'),
        dict(data_root='s3://bucket'),
        dict(data_prefix=dict(img='s3://bucket/images')),
        dict(type='CIFAR10', data_root='/nowhere'),
    ],
)
def test_data_that_is_there_or_is_fetched_passes(data: Path, changes: dict[str, Any]) -> None:
    cfg = config(data, **changes)
    check_data(cfg)
    assert cfg == config(data, **changes)


@pytest.mark.parametrize(
    ('changes', 'named'),
    [
        (dict(ann_file='b.json'), r'coco/b\.json \(train_dataloader\.dataset\.ann_file\)'),
        (dict(data_prefix='jpg'), r'coco/jpg \(train_dataloader\.dataset\.data_prefix\)'),
        (dict(data_prefix=dict(img='jpg')), r'coco/jpg \(.*data_prefix\.img\)'),
        (dict(ann_file='/b.json'), r'not found: /b\.json'),
        (dict(data_root='/x', ann_file='b'), r'not found: /x \(.*data_root\);'),
        (dict(type='CIFAR10', data_root='/x', download=False), r'not found: /x'),
    ],
)
def test_missing_data_is_named(data: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        check_data(config(data, **changes))
    assert 'data_root=DIR' in str(caught.value)
    check_data(config(data, **changes), splits=('val', 'test'))


def test_wrapped_data_sets_are_looked_into(data: Path) -> None:
    good = config(data)['train_dataloader']['dataset']
    bad = {**good, 'ann_file': 'b.json'}
    repeat = dict(type='RepeatDataset', times=2, dataset=bad)
    concat = dict(type='ConcatDataset', datasets=[good, repeat])
    with pytest.raises(ConfigError, match=r'b\.json'):
        check_data(dict(val_dataloader=dict(dataset=concat)))
    check_data(dict(val_dataloader=dict(dataset=dict(type='ConcatDataset', datasets=[good]))))


def test_evaluators_are_looked_at(data: Path) -> None:
    evaluators = [dict(type='CocoMetric', ann_file=str(data / 'b.json')), dict(type='Accuracy')]
    with pytest.raises(ConfigError, match=r'b\.json \(test_evaluator\.ann_file\)'):
        check_data(dict(test_evaluator=evaluators))


def test_key_mismatch_names_all_three_kinds() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = {f'module.{key}': value for key, value in model.state_dict().items()}
    assert key_mismatch(model, state) == ''
    state['module.0.weight'] = torch.ones(5, 5)
    state['module.extra'] = state.pop('module.1.bias')
    found = key_mismatch(model, state)
    assert found == '1 missing: 1.bias; 1 unexpected: extra; 1 of another shape: 0.weight'


def test_a_web_address_is_downloaded_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('LOCAL_RANK', '0')
    path = save(tmp_path / 'a.pth', weight=torch.ones(2))
    local = downloaded(path.as_uri())
    assert local == tmp_path / 'home' / 'hub' / 'checkpoints' / 'a.pth'
    assert torch.equal(check_checkpoint(local)['weight'], torch.ones(2))
    for kept in ('open-mmlab://x', 'b.pth', tmp_path / 'b.pth'):
        assert downloaded(kept) == kept
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert downloaded('https://127.0.0.1:9/b.pth') == 'https://127.0.0.1:9/b.pth'


class RunsCode:
    """Pickled, it would create a folder where it is loaded."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def test_code_in_a_downloaded_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('LOCAL_RANK', '0')
    torch.save({'state_dict': {}, 'x': RunsCode(str(tmp_path / 'ran'))}, tmp_path / 'a.pth')
    with pytest.raises(ConfigError, match=r'mkdir.*; loading it would run code') as caught:
        check_checkpoint(downloaded((tmp_path / 'a.pth').as_uri()))
    assert 'weights_only' not in str(caught.value)
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'ran').exists()
