# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The teacher is the FP32 model, also in a resumed run."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from gplq_mm.analysis.start_error import float_state_of
from gplq_mm.integrations.mm.checkpoints.checkpoint_io import read_checkpoint
from gplq_mm.integrations.mm.checkpoints.run_checkpoint import (
    file_sha256,
    load_float_,
)
from gplq_mm.integrations.mm.data.calibration_data import CalibrationSet
from gplq_mm.integrations.mm.run.teacher import attach_teacher, pca_images
from tests.helpers.runners import float_config, gplq_config, make_runner
from tests.helpers.tiny_projects import TinyProject


@pytest.fixture(autouse=True)
def scope() -> Iterator[None]:
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield


def student(project: TinyProject, fp32: Path, kind: str = 'logits') -> Any:
    recipe = dict(base='w4a4', mimic=dict(type=kind))
    model = MODELS.build(
        dict(type='gplq_mm.GPLQ', model=float_config(project).model, recipe=recipe)
    )
    load_float_(model, read_checkpoint(fp32))
    return model


def source(path: Path) -> dict[str, Any]:
    return {'path': str(path), 'sha256': file_sha256(path)}


def assert_is_fp32(teacher: nn.Module, fp32: Path) -> None:
    state, expected = teacher.state_dict(), read_checkpoint(fp32)['state_dict']
    assert set(state) == set(expected)
    assert all(torch.equal(state[k], expected[k]) for k in state)


NO_IMAGES: Any = None


def test_a_fresh_run_copies_the_weights_at_hand(project: TinyProject, fp32: Path) -> None:
    model = student(project, fp32)
    state = float_state_of(model)
    attach_teacher(model, {'path': 'gone.pth', 'sha256': None}, state, NO_IMAGES)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    assert_is_fp32(model.teacher, fp32)


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_a_resumed_run_reads_the_checkpoint_again(
    project: TinyProject, fp32: Path, tmp_path: Path, prefix: str
) -> None:
    state = read_checkpoint(fp32)['state_dict']
    again = tmp_path / 'again.pth'
    torch.save({'state_dict': {prefix + k: v for k, v in state.items()}}, again)
    model = student(project, fp32)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    attach_teacher(model, source(again), None, NO_IMAGES)
    assert_is_fp32(model.teacher, fp32)


def test_another_file_under_the_same_name_is_refused(
    project: TinyProject, fp32: Path, tmp_path: Path
) -> None:
    told = {'path': str(tmp_path / 'x.pth'), 'sha256': file_sha256(fp32)}
    model = student(project, fp32)
    with pytest.raises(ValueError, match='does not exist or is not the one'):
        attach_teacher(model, told, None, NO_IMAGES)
    torch.save({'state_dict': {}}, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match='does not exist or is not the one'):
        attach_teacher(model, told, None, NO_IMAGES)


def test_a_model_that_does_not_mimic_needs_no_teacher(project: TinyProject) -> None:
    attach_teacher(nn.Linear(1, 1), {}, None, NO_IMAGES)
    model = MODELS.build(
        dict(
            type='gplq_mm.GPLQ',
            model=float_config(project).model,
            recipe=dict(base='w4a4', mimic=None),
        )
    )
    attach_teacher(model, {}, None, NO_IMAGES)
    assert '_teacher' not in model.__dict__


def test_a_pca_basis_is_fitted_on_preprocessed_images(project: TinyProject, fp32: Path) -> None:
    model = student(project, fp32, 'pca')
    images = torch.randint(0, 255, (40, 3, 32, 32))
    asked: list[int | None] = []

    def batches(num_images: int | None) -> list[Any]:
        asked.append(num_images)
        return [dict(inputs=part) for part in images.split(10)]

    attach_teacher(model, source(fp32), None, batches)
    ((settings, components),) = model.mimic_state()['bases']
    assert settings['layer'] == 'penultimate'
    assert asked == [None]
    assert components.shape == (32, 32)
    with torch.no_grad():
        inputs = model.data_preprocessor(dict(inputs=copy.deepcopy(images)), False)['inputs']
        features = model.teacher.extract_feat(inputs)[-1].double()
    centred = features - features.mean(0)
    variance = (centred @ components.double()).square().mean(0)
    assert torch.all(variance[:-1] >= variance[1:] - 1e-6)
    top = torch.linalg.svdvals(centred)[0] ** 2 / len(images)
    assert variance[0].item() == pytest.approx(top.item(), rel=1e-3)


def test_too_few_images_for_a_basis(project: TinyProject, fp32: Path) -> None:
    model = student(project, fp32, 'pca')
    four = [dict(inputs=torch.randint(0, 255, (4, 3, 32, 32)))]
    with pytest.raises(ValueError, match=r'4 samples cannot give 32.*num_images'):
        attach_teacher(model, source(fp32), None, lambda num_images: four)


def test_few_images_for_a_basis_reach_every_rank(
    project: TinyProject, fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(gplq_config(project, fp32, tmp_path))
    calibration = CalibrationSet(runner.cfg, num_images=4, seed=0, batch_size=1)
    for module in ('data.calibration_data', 'run.teacher'):
        monkeypatch.setattr(f'gplq_mm.integrations.mm.{module}.world', lambda: (0, 8))
    assert len(pca_images(calibration)(20).batches) == 10
    with pytest.raises(ValueError, match='cannot be distributed over 8 ranks'):
        pca_images(calibration)(7)
