# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Stored checkpoints of every stage load, hold what they held, and are written again bit for bit.

They stand for the files that users have. A failure here is a break of the format: the code has
to change, not the files in `tests/checkpoints`.
"""

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gplq_mm
from tests.helpers.checkpoint_fixtures import FOLDER, codes_of, layers_of, unpacked
from tests.helpers.plain_vit import PlainViT, pixels, plain_vit

STAGES = ('calibrated', 'stage1', 'final')
CODES: dict[str, dict[str, str]] = json.loads((FOLDER / 'weight_codes.json').read_text())
RUNS = [f'{network}_{stage}' for network in ('vit', 'detector') for stage in STAGES]
PLAIN = [f'plain_{stage}' for stage in STAGES]


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Equal keys in equal order, dtypes, shapes and bits."""
    assert list(one) == list(two)
    for key, value in one.items():
        assert (value.dtype, value.shape) == (two[key].dtype, two[key].shape), key
        bytes_ = [t.contiguous().reshape(-1).view(torch.uint8) for t in (value, two[key])]
        assert torch.equal(*bytes_), key


def test_the_folder_is_small_and_complete() -> None:
    files = {path.name for path in FOLDER.glob('*.xz')}
    assert files == {f'{name}.pth.xz' for name in (*RUNS, *PLAIN)} == {f'{n}.pth.xz' for n in CODES}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 600_000


@pytest.mark.parametrize('name', CODES)
def test_weight_codes_are_integers_of_their_range(name: str, tmp_path: Path) -> None:
    if name in RUNS:
        pytest.importorskip('mmengine')  # whose types a training state holds
    state = torch.load(unpacked(name, tmp_path), weights_only=False)['state_dict']
    calibrated = [k for k in layers_of(state) if bool(state[f'{k}.weight_quantizer.calibrated'])]
    assert calibrated == list(CODES[name])
    assert (len(calibrated) == len(layers_of(state)) > 0) is name.endswith('final')
    for layer in calibrated:
        codes = codes_of(state, layer)
        low, high = state[f'{layer}.weight_quantizer.quant_range'].tolist()
        assert low <= codes.min() and codes.max() <= high
        assert hashlib.sha256(codes.numpy().tobytes()).hexdigest() == CODES[name][layer], layer


@pytest.mark.parametrize('name', PLAIN)
def test_a_file_of_save_is_loaded_and_saved_again(name: str, tmp_path: Path) -> None:
    path = unpacked(name, tmp_path)
    model = gplq_mm.load(path, plain_vit(seed=5), recipe=dict(calibration=dict(num_images=16)))
    gplq_mm.save(model, tmp_path / 'again.pth')
    stored, again = (torch.load(p, weights_only=True) for p in (path, tmp_path / 'again.pth'))
    assert_same(stored['state_dict'], again['state_dict'])
    for content in (stored, again):
        del content['gplq']['gplq_mm_version']
    assert repr(stored['gplq']) == repr(again['gplq'])
    with torch.no_grad():
        assert model(pixels(2)).isfinite().all()


def test_a_file_of_save_is_refused_for_another_model_or_recipe(tmp_path: Path) -> None:
    path = unpacked('plain_final', tmp_path)
    with pytest.raises(ValueError, match='checkpoint != yours: activation.num_bits: 4 != 3'):
        gplq_mm.load(path, plain_vit(), 'w3a3')
    with pytest.raises(ValueError, match='does not fit PlainViT: missing keys: blocks.2.attn'):
        gplq_mm.load(path, PlainViT(depth=3))


class Stored:
    """A checkpoint of a run, the model that its config describes, and the hook of the run."""

    def __init__(self, name: str, folder: Path, recipe: Any = None) -> None:
        pytest.importorskip('mmdet')
        pytest.importorskip('mmpretrain')
        from mmengine.config import Config
        from mmengine.registry import HOOKS, MODELS, DefaultScope

        self.hook: Any = HOOKS.build(dict(type='gplq_mm.GPLQHook'))
        self.content = torch.load(unpacked(name, folder), weights_only=True)
        cfg = Config.fromstring(self.content['meta']['cfg'], '.py')
        if recipe is not None:
            cfg.model.recipe = recipe
        if cfg.get('default_scope') == 'mmpretrain':
            cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmdet')):
            torch.manual_seed(5)
            self.model: nn.Module = MODELS.build(cfg.model)
        self.runner: Any = SimpleNamespace(model=self.model, cfg=cfg, _resume=False)

    def load(self) -> None:
        """As a test of the checkpoint does it: the hook looks at it, then MMEngine loads it."""
        self.hook.after_load_checkpoint(self.runner, self.content)
        self.model.load_state_dict(self.content['state_dict'])


@pytest.mark.parametrize('name', RUNS)
def test_a_run_is_loaded_and_saved_again(name: str, tmp_path: Path) -> None:
    stored = Stored(name, tmp_path)
    state = {key: value.clone() for key, value in stored.content['state_dict'].items()}
    stored.load()
    assert_same(dict(stored.model.state_dict()), state)
    again: dict[str, Any] = {'state_dict': stored.model.state_dict()}
    stored.hook.before_save_checkpoint(stored.runner, again)
    for key in ('recipe', 'float_checkpoint'):
        assert repr(again['gplq'][key]) == repr(stored.content['gplq'][key])
    stage = {'calibrated': 'calibrated', 'stage1': 'stage1', 'final': 'stage2'}
    assert stored.content['gplq']['stage'] == stage[name.rpartition('_')[2]]
    torch.save(again, tmp_path / 'again.pth')
    assert_same(torch.load(tmp_path / 'again.pth', weights_only=True)['state_dict'], state)


ANOTHER = 'the checkpoint was made with another recipe; checkpoint != config: '


@pytest.mark.parametrize(
    ('name', 'recipe', 'message'),
    [
        ('vit_final', 'w3a3', f'{ANOTHER}activation.num_bits: 4 != 3; weight.num_bits: 4 != 3'),
        ('vit_stage1', 'w3a3', f'{ANOTHER}activation.num_bits: 4 != 3'),
        ('detector_final', dict(base='w4a4', scope='all'), f'{ANOTHER}scope: '),
    ],
)
def test_another_recipe_is_refused(name: str, recipe: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f'^{re.escape(message)}'):
        Stored(name, tmp_path, recipe).load()


def test_uncalibrated_or_incomplete_files_are_refused(tmp_path: Path) -> None:
    stored = Stored('vit_final', tmp_path)
    whole = dict(stored.content['state_dict'])
    name = next(key for key in whole if key.endswith('input_quantizer.calibrated'))
    stored.content['state_dict'][name] = torch.tensor(False)
    uncalibrated = f'1 quantizers of the checkpoint were never calibrated, first {name[:-11]}'
    with pytest.raises(ValueError, match=f'^{re.escape(uncalibrated)}; run tools/train.py'):
        stored.load()
    stored.content['state_dict'] = {key: whole[key] for key in whole if key != name}
    with pytest.raises(ValueError, match=f'does not fit ImageClassifier: missing keys: {name}'):
        stored.load()
    del stored.content['gplq']
    with pytest.raises(ValueError, match='^the checkpoint holds no GPLQ state: it is a float'):
        stored.load()


@pytest.mark.parametrize(
    ('name', 'resume', 'message'),
    [
        ('vit_stage1', False, 'the checkpoint is quantized already, GPLQ starts from a float'),
        ('vit_final', True, 'the checkpoint holds no state of a GPLQ training to resume from'),
    ],
)
def test_a_training_does_not_begin_with_it(
    name: str, resume: bool, message: str, tmp_path: Path
) -> None:
    stored = Stored(name, tmp_path)
    stored.hook.session, stored.runner._resume = 'a training', resume
    with pytest.raises(ValueError, match=f'^{message}'):
        stored.load()


def test_a_training_resumes_from_the_calibrated_one(tmp_path: Path) -> None:
    stored = Stored('vit_calibrated', tmp_path)
    stored.hook.session, stored.runner._resume = 'a training', True
    stored.load()
    assert stored.hook.source['path'] == 'float.pth'
    assert stored.hook.random_state == stored.content['gplq']['random_state']
