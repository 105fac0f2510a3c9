# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A packed file of `tools/deploy.py` is taken wherever a checkpoint is, with the same outputs."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')

from mmengine.config import Config
from mmengine.registry import HOOKS, DefaultScope, init_default_scope
from mmengine.runner import load_checkpoint

import gplq_mm
from gplq_mm.analysis import model_bytes
from gplq_mm.deployment.packed_file import ABOUT, PACKED_KEY
from gplq_mm.integrations.mm.checkpoints.checkpoint_io import read_checkpoint
from gplq_mm.integrations.mm.checkpoints.quantized_model import float_model_config
from gplq_mm.integrations.mm.deployment import packed_format
from gplq_mm.integrations.mm.deployment.finished_model import build_finished
from gplq_mm.registry import MODELS
from tests.helpers.checkpoint_fixtures import unpacked
from tests.helpers.tools import load_tool

deploy = load_tool('deploy')
SUFFIXES = ('pth', 'safetensors')


@dataclass
class Deployed:
    """A finished run, its model, and its packed files in one folder."""

    folder: Path
    cfg: Config
    model: nn.Module

    @property
    def config(self) -> str:
        return str(self.folder / 'config.py')

    @property
    def final(self) -> str:
        return str(self.folder / f'{self.folder.name}_final.pth')

    def file(self, suffix: str) -> str:
        return str(self.folder / f'deployed.{suffix}')

    def build(self) -> Any:
        cfg = copy.deepcopy(self.cfg.model)
        if self.cfg.get('data_preprocessor'):
            cfg.setdefault('data_preprocessor', self.cfg.data_preprocessor)
        with DefaultScope.overwrite_default_scope(self.cfg.default_scope):
            torch.manual_seed(7)
            return MODELS.build(cfg).eval()


def prepared(name: str, folder: Path) -> Deployed:
    folder = folder / name
    folder.mkdir()
    checkpoint = torch.load(unpacked(f'{name}_final', folder), weights_only=True)
    cfg = Config.fromstring(checkpoint['meta']['cfg'], '.py')
    cfg.dump(folder / 'config.py')
    run = Deployed(folder, cfg, build_finished(cfg, checkpoint))
    for suffix in SUFFIXES:
        deploy.main([run.config, run.final, '-o', run.file(suffix)])
    return run


@pytest.fixture(scope='module')
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return prepared('vit', tmp_path_factory.mktemp('deployed'))


@pytest.fixture(scope='module')
def detector(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return prepared('detector', tmp_path_factory.mktemp('deployed'))


def same_outputs(one: Any, two: Any) -> bool:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64) if hasattr(one, 'rpn_head') else torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        a, b = ([*_tensors(m.extract_feat(x))] for m in (one.eval(), two.eval()))
    return len(a) == len(b) > 0 and all(
        torch.equal(p.view(torch.int32), q.view(torch.int32)) for p, q in zip(a, b, strict=True)
    )


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in _tensors(v)]


def same_state(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize('name', ['classifier', 'detector'])
def test_mmengine_loads_it(name: str, suffix: str, request: pytest.FixtureRequest) -> None:
    run: Deployed = request.getfixturevalue(name)
    model = run.build()
    checkpoint = load_checkpoint(model, run.file(suffix), map_location='cpu', strict=True)
    assert checkpoint['gplq']['stage'] == 'stage2'
    assert same_state(model, run.model)
    assert same_outputs(model, run.model)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_the_hook_of_a_run_takes_it(detector: Deployed, suffix: str) -> None:
    model = detector.build()
    hook: Any = HOOKS.build(dict(type='gplq_mm.GPLQHook'))
    if suffix == 'pth':
        checkpoint = torch.load(detector.file(suffix), weights_only=True)
        assert list(checkpoint['state_dict']) == [PACKED_KEY]
    else:
        checkpoint = read_checkpoint(detector.file(suffix))
    hook.after_load_checkpoint(SimpleNamespace(model=model), checkpoint)
    model.load_state_dict(checkpoint['state_dict'])
    assert same_state(model, detector.model)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_init_detector_and_inferencer_take_it(detector: Deployed, suffix: str) -> None:
    from mmdet.apis import DetInferencer, init_detector

    init_default_scope('mmdet')
    model = init_detector(detector.config, detector.file(suffix), device='cpu')
    assert same_outputs(model, detector.model)
    classes = detector.cfg.train_dataloader.dataset.metainfo.classes
    assert tuple(model.dataset_meta['classes']) == tuple(classes)
    inferencer = DetInferencer(detector.config, detector.file(suffix), device='cpu')
    assert same_outputs(inferencer.model, detector.model)


def test_the_inferencer_takes_safetensors_in_a_new_process(detector: Deployed) -> None:
    config = detector.folder / 'imports.py'
    module = 'gplq_mm.integrations.mm.builder'
    config.write_text(f"_base_ = './config.py'\ncustom_imports = dict(imports=['{module}'])\n")
    code = (
        'import sys; from mmdet.apis import DetInferencer; assert "gplq_mm" not in sys.modules; '
        'model = DetInferencer(*sys.argv[1:], device="cpu").model; print(type(model).__name__)'
    )
    command = [sys.executable, '-c', code, str(config), detector.file('safetensors')]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == type(detector.model).__name__


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_get_model_and_inferencer_take_it(classifier: Deployed, suffix: str) -> None:
    from mmpretrain import ImageClassificationInferencer, get_model

    init_default_scope('mmpretrain')  # a detector's test may have set another one
    model = get_model(classifier.config, classifier.file(suffix), device='cpu')
    assert same_outputs(model, classifier.model)
    inferencer = ImageClassificationInferencer(
        classifier.config, classifier.file(suffix), device='cpu'
    )
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    given = ImageClassificationInferencer(classifier.config, classifier.final, device='cpu')
    results = [i(image)[0]['pred_scores'] for i in (inferencer, given)]
    assert np.array_equal(*results)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_load_takes_it_without_a_config(classifier: Deployed, suffix: str) -> None:
    init_default_scope('mmpretrain')
    cfg = float_model_config(copy.deepcopy(classifier.cfg.model.to_dict()))
    cfg.setdefault('data_preprocessor', classifier.cfg.get('data_preprocessor'))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg)
    loaded = gplq_mm.load(classifier.file(suffix), model)
    assert loaded.gplq.stage == 'stage2'  # type: ignore[union-attr]
    assert same_outputs(loaded, classifier.model)


def test_a_packed_file_can_be_deployed_again(classifier: Deployed, tmp_path: Path) -> None:
    out = tmp_path / 'new folder' / 'again.pth'
    deploy.main([classifier.config, classifier.file('safetensors'), '-o', str(out)])
    first, second = (torch.load(p, weights_only=True) for p in (classifier.file('pth'), out))
    assert torch.equal(first['state_dict'][PACKED_KEY], second['state_dict'][PACKED_KEY])
    assert first['meta'] == second['meta']
    assert first['gplq'] == second['gplq']
    assert [path.name for path in out.parent.iterdir()] == ['again.pth']


def test_half_precision_is_smaller_and_said(
    detector: Deployed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / 'half.pth'
    deploy.main([detector.config, detector.final, '-o', str(out), '--fp16'])
    assert 'outputs differ slightly' in capsys.readouterr().out
    about = torch.load(out, weights_only=True)['gplq'][ABOUT]
    assert (about['float_dtype'], about['equals_unpacked']) == ('float16', False)
    assert out.stat().st_size < 0.8 * Path(detector.file('pth')).stat().st_size
    model = detector.build()
    load_checkpoint(model, str(out), map_location='cpu', strict=True)
    assert list(packed_format.differences(detector.model, model, fp16=True)) == []
    assert list(packed_format.differences(detector.model, model, fp16=False)) != []


def test_a_file_that_differs_is_not_left(
    classifier: Deployed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(cfg: Config, checkpoint: dict[str, Any]) -> nn.Module:
        model = build_finished(cfg, checkpoint)
        with torch.no_grad():
            model.backbone.cls_token += 1  # type: ignore[operator]
        return model

    monkeypatch.setattr(packed_format, 'build_finished', build)
    with pytest.raises(RuntimeError, match='1 tensors of the packed model differ, first backbone'):
        deploy.main([classifier.config, classifier.final, '-o', str(tmp_path / 'x.pth')])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_damaged_file_is_refused(detector: Deployed, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f'damaged.{suffix}'
    content = Path(detector.file(suffix)).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r'damaged\.\w+.*(truncated|cannot be read)'):
        read_checkpoint(path)
    place = len(content) // 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(ValueError, match='checksum that was written with it'):
        read_checkpoint(path)
    if suffix == 'pth':  # MMEngine's loader does not check files
        with pytest.raises(ValueError, match='checksum that was written with it'):
            load_checkpoint(detector.build(), str(path), map_location='cpu')


def test_an_edited_config_is_noticed(classifier: Deployed, tmp_path: Path) -> None:
    checkpoint = torch.load(classifier.file('pth'), weights_only=True)
    checkpoint['gplq']['recipe']['activation']['num_bits'] = 8
    torch.save(checkpoint, tmp_path / 'edited.pth')
    with pytest.raises(ValueError, match='its recipe, config or meta is not the one'):
        read_checkpoint(tmp_path / 'edited.pth')


def test_the_file_is_small(detector: Deployed) -> None:
    final, packed = (Path(p).stat().st_size for p in (detector.final, detector.file('pth')))
    assert packed < 0.75 * final
    overhead = packed - model_bytes(detector.model)
    assert overhead < 50_000, 'header, index, config and recipe do not grow with the weights'
