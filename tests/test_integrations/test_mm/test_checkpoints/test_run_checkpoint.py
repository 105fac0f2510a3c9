# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Checkpoints: what is refused, by name, and that a kill leaves whole files."""

import copy
import hashlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gplq_mm.analysis.start_error import quantization_keys
from gplq_mm.convert import convert_, quantizers
from gplq_mm.integrations.mm.checkpoints.run_checkpoint import (
    check_quantized,
    file_sha256,
    load_float_,
    record,
    save_resumable,
    save_snapshot,
    unwrap,
)
from gplq_mm.recipe import as_recipe
from tests.helpers.models import Detector
from tests.helpers.tiny_projects import TinyProject, our_tool, run_python

RECIPE = dict(base='w4a4', scope='all', rules=[])


def converted(recipe: Any = RECIPE) -> Any:
    model: Any = Detector()
    resolved = as_recipe(recipe)
    convert_(model, resolved)
    model.gplq = SimpleNamespace(recipe=resolved)
    return model


def float_checkpoint(prefix: str = '') -> dict[str, Any]:
    torch.manual_seed(5)
    state = Detector().state_dict()
    return {'state_dict': {prefix + k: v for k, v in state.items()}}


def quantized_checkpoint(model: Any) -> dict[str, Any]:
    for quantizer in quantizers(model, 'activation').values():
        quantizer.set_qparams(quantizer.scale * 0.5, quantizer.zero_point)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return {'state_dict': state, 'gplq': record(model, 'stage1', {'path': 'x', 'sha256': None})}


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_float_weights_are_loaded_and_the_checkpoint_completed(prefix: str) -> None:
    model, checkpoint = converted(), float_checkpoint(prefix)
    load_float_(model, checkpoint)
    state = model.state_dict()
    for name, value in float_checkpoint()['state_dict'].items():
        assert torch.equal(state[name], value)
    # MMEngine loads it once more and must find nothing missing
    stripped = {k.removeprefix('module.') for k in checkpoint['state_dict']}
    assert stripped == set(state)


def test_a_bare_state_dict_is_loaded_too() -> None:
    model, checkpoint = converted(), float_checkpoint()['state_dict']
    load_float_(model, checkpoint)
    assert torch.equal(model.neck.weight, checkpoint['neck.weight'])


def drop(state: dict[str, Tensor]) -> None:
    del state['backbone.attn.proj.bias']


def add(state: dict[str, Tensor]) -> None:
    state['backbone.extra.weight'] = torch.ones(1)


def reshape(state: dict[str, Tensor]) -> None:
    state['neck.weight'] = torch.ones(6, 5, 2, 2)


def infect(state: dict[str, Tensor]) -> None:
    state['bbox_head.1.weight'][0] = float('inf')


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (drop, r'missing keys: backbone\.attn\.proj\.bias;.*load_from'),
        (add, r'keys that the model does not have: backbone\.extra\.weight;'),
        (reshape, r'other shapes: neck\.weight \(6, 5, 2, 2\), model \(6, 4, 2, 2\);'),
        (infect, r'NaN or infinity in: bbox_head\.1\.weight;'),
    ],
)
def test_float_weights_that_do_not_fit_are_named(edit: Any, message: str) -> None:
    checkpoint = float_checkpoint()
    edit(checkpoint['state_dict'])
    with pytest.raises(ValueError, match=message):
        load_float_(converted(), checkpoint)


def test_batch_norm_counters_are_no_reason_to_refuse() -> None:
    checkpoint = float_checkpoint()
    checkpoint['state_dict']['neck.bn.num_batches_tracked'] = torch.tensor(3)
    model = converted()
    load_float_(model, checkpoint)
    assert torch.equal(model.neck.weight, checkpoint['state_dict']['neck.weight'])


def test_a_long_list_of_names_is_cut() -> None:
    checkpoint = float_checkpoint()
    names = [k for k in checkpoint['state_dict'] if 'backbone' in k]
    for name in names:
        del checkpoint['state_dict'][name]
    with pytest.raises(ValueError, match=f'and {len(names) - 4} more'):
        load_float_(converted(), checkpoint)


def test_a_checkpoint_of_this_recipe_passes() -> None:
    model = converted()
    check_quantized(model, quantized_checkpoint(converted()))
    assert model.gplq.recipe == as_recipe(RECIPE)


def test_a_float_checkpoint_is_not_taken_for_a_quantized_one() -> None:
    with pytest.raises(ValueError, match=r'no GPLQ state.*gplq_final\.pth or gplq_stage1\.pth'):
        check_quantized(converted(), float_checkpoint())


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        (dict(base='w3a3'), r'activation\.num_bits: 4 != 3; weight\.num_bits: 4 != 3'),
        (dict(activation=dict(symmetric=True)), r'activation\.symmetric: False != True'),
        (dict(rules=[dict(name='neck', num_bits=8)]), r'rules: '),
    ],
)
def test_another_recipe_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f'another recipe; checkpoint != config: .*{named}'):
        check_quantized(converted({**RECIPE, **change}), quantized_checkpoint(converted()))


def test_settings_of_the_training_may_differ() -> None:
    other = dict(optim=dict(lr=1.0), mimic=None, weight=dict(ptq='minmax'), name='mine')
    other['calibration'] = dict(num_images=7)
    other['gate'] = dict(action='warn')
    model = converted({**RECIPE, **other})
    check_quantized(model, quantized_checkpoint(converted()))
    assert model.gplq.recipe == as_recipe({**RECIPE, **other})


def test_an_uncalibrated_quantizer_is_named() -> None:
    checkpoint = quantized_checkpoint(converted())
    name = 'backbone.attn.qkv.input_quantizer'
    checkpoint['state_dict'][f'{name}.calibrated'].fill_(False)
    with pytest.raises(ValueError, match=f'1 quantizers .* never calibrated, first {name}'):
        check_quantized(converted(), checkpoint)


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (drop, r'missing keys: backbone\.attn\.proj\.bias; use the config'),
        (add, r'keys that the model does not have: backbone\.extra\.weight;'),
        (reshape, r'other shapes: neck\.weight \(6, 5, 2, 2\), model \(6, 4, 2, 2\);'),
    ],
)
def test_quantized_weights_of_another_model_are_named(edit: Any, message: str) -> None:
    checkpoint = quantized_checkpoint(converted())
    edit(checkpoint['state_dict'])
    with pytest.raises(ValueError, match=message):
        check_quantized(converted(), checkpoint)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('name', ['bbox_head.1.weight', 'backbone.attn.qkv.input_quantizer.scale'])
def test_weights_and_scales_that_are_no_numbers_are_named(name: str, value: float) -> None:
    checkpoint = quantized_checkpoint(converted())
    checkpoint['state_dict'][name].view(-1)[0] = value
    with pytest.raises(ValueError, match=f'NaN or infinity in: {re.escape(name)}; give an earlier'):
        check_quantized(converted(), checkpoint)


def test_infinity_in_a_mask_is_no_reason_to_refuse() -> None:
    model, other = converted(), converted()
    for network in (model, other):
        network.register_buffer('mask', torch.full((2,), float('-inf')))
    check_quantized(model, quantized_checkpoint(other))
    assert not model.mask.isfinite().any()


def test_added_keys_are_the_quantizers() -> None:
    model = converted()
    assert set(model.state_dict()) - quantization_keys(model) == set(Detector().state_dict())


class Wrapper(nn.Module):
    """As DDP holds a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_wrappers_are_looked_through() -> None:
    model = converted()
    assert unwrap(Wrapper(Wrapper(model))) is model
    with pytest.raises(TypeError, match=r"Detector was not built by type='gplq_mm\.GPLQ'"):
        unwrap(Wrapper(Detector()))


def test_sha256_of_files_only(tmp_path: Path) -> None:
    path = tmp_path / 'x.bin'
    path.write_bytes(bytes(range(256)) * 9000)
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert file_sha256('https://nowhere.invalid/x.pth') is None


def test_a_kill_while_a_snapshot_is_written_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / 'gplq_final.pth'
    save_snapshot({'state_dict': {'a': torch.ones(3)}}, path)

    def killed(content: Any, file: Any) -> None:
        file.write(b'half of it')
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', killed)
    with pytest.raises(KeyboardInterrupt):
        save_snapshot({'state_dict': {'a': torch.zeros(3)}}, path)
    assert torch.equal(torch.load(path)['state_dict']['a'], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ['gplq_final.pth']


def fake_runner(work_dir: Path, content: str, fail: bool = False) -> Any:
    def save_checkpoint(out_dir: str, filename: str, meta: dict[str, int]) -> None:
        assert meta == {'epoch': 2, 'iter': 7}
        Path(out_dir, filename).write_text(content)
        if fail:
            raise KeyboardInterrupt

    return SimpleNamespace(work_dir=str(work_dir), epoch=2, iter=7, save_checkpoint=save_checkpoint)


def test_a_kill_while_a_training_state_is_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = save_resumable(fake_runner(tmp_path, 'whole'), 'gplq_calibrated.pth')
    marker = tmp_path / 'last_checkpoint'
    assert marker.read_text() == path
    marker.write_text('older')
    with pytest.raises(KeyboardInterrupt):
        save_resumable(fake_runner(tmp_path, 'ha', fail=True), 'gplq_calibrated.pth')
    assert Path(path).read_text() == 'whole'
    assert marker.read_text() == 'older'
    save_resumable(fake_runner(tmp_path, 'new'), 'gplq_calibrated.pth')
    assert Path(path).read_text() == 'new'
    assert marker.read_text() == path


def test_a_recorded_recipe_is_a_plain_copy_that_loads_safely(tmp_path: Path) -> None:
    model = converted()
    checkpoint = quantized_checkpoint(model)
    torch.save(copy.deepcopy(checkpoint), tmp_path / 'x.pth')
    loaded = torch.load(tmp_path / 'x.pth', weights_only=True)
    check_quantized(model, loaded)
    assert loaded['gplq']['stage'] == 'stage1'


@pytest.fixture(scope='module')
def truncated(project: TinyProject, fp32: Path) -> Path:
    path = project.root / 'truncated.pth'
    path.write_bytes(fp32.read_bytes()[:-5000])
    return path


def test_a_truncated_fp32_checkpoint_is_one_line_before_any_work(
    project: TinyProject, truncated: Path
) -> None:
    from tests.helpers.gplq_runs import write_gplq_config

    config = write_gplq_config(project, truncated, name='truncated')
    done = run_python(our_tool('train'), config, '--work-dir', 'never', cwd=project.root)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith('error:')]
    assert len(lines) == 1
    assert str(truncated) in lines[0]
    assert 'truncated' in lines[0]
    assert 'Traceback' not in done.stderr
    assert not (project.root / 'never').exists()
