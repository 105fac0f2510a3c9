# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The functions for any model, and a run of MMEngine, give the same bits."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip('mmpretrain')

from mmengine.registry import DefaultScope
from mmpretrain.structures import DataSample

import gplq_mm
from gplq_mm.integrations.mm import session
from gplq_mm.integrations.mm.builder import build_gplq
from gplq_mm.integrations.mm.optim import GPLQOptimWrapperConstructor
from gplq_mm.integrations.mm.run.gate import gate_of_run
from gplq_mm.registry import MODELS
from tests.helpers.plain_vit import pixels

MODEL = dict(
    type='mmpretrain.ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32),
        img_size=8,
        patch_size=2,
    ),
    head=dict(type='VisionTransformerClsHead', num_classes=3, in_channels=16, topk=(1,)),
)
X = pixels(24)


class Images:
    """Stands in for a run's calibration set: images at hand, none preprocessed."""

    def __init__(self, images: Tensor, size: int = 1) -> None:
        self.indices, self.batches = list(range(len(images))), images.split(size)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)

    def following(self, number: int) -> 'Images':
        others = Images(torch.cat(self.batches)[:number], len(self.batches[0]))
        others.numbered, others.load = lambda: enumerate(others.batches), others.batches.__getitem__
        return others

    def log(self) -> None:
        pass

    def sample(self, number: int, size: int, most: int, section: str) -> 'Images':
        return Images(torch.cat(self.batches)[:number], size)

    def run_pass(self, model: nn.Module, title: str, passes: int = 0) -> Any:
        @torch.no_grad()
        def run() -> None:
            for batch in self.batches:
                model.eval()(batch)
            model.train()

        return run


@pytest.fixture(scope='module')
def built() -> tuple[Any, nn.Module]:
    """Model of the builder, and the float model with the same weights."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        torch.manual_seed(0)
        model = build_gplq(model=MODEL)
        teacher = MODELS.build(copy.deepcopy(MODEL))
    own = model.state_dict()
    teacher.load_state_dict({k: own[k] for k in teacher.state_dict()})
    return model, teacher.eval()


def test_calibration_loss_and_optimizer_have_equal_bits(
    built: tuple[Any, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, teacher = built
    ours = copy.deepcopy(teacher).train()
    coverage = gplq_mm.quantize(ours)
    assert coverage.as_dict() == model.gplq.coverage.as_dict()
    assert ours.gplq.recipe == model.gplq.recipe
    gate = gplq_mm.calibrate(ours, X.split(5)).gate

    monkeypatch.setattr(session, 'require_runs', lambda *_: None)
    run = session.GPLQSession.__new__(session.GPLQSession)
    run.model = model
    run.calibration = Images(X, run.recipe.calibration.batch_size)
    run.report = SimpleNamespace(update=lambda *_, **__: None)
    run._calibrate()
    own, other = ours.state_dict(), model.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[k], other[k]) for k in own)

    monkeypatch.setattr(model.data_preprocessor, 'forward', lambda x, _: {'inputs': x})
    measured = gate_of_run(model, run.calibration, teacher.state_dict(), run.recipe.gate).measure()
    assert gate == measured.as_dict() and 0 < gate['feature_error'] < gate['limit']
    monkeypatch.undo()

    model.attach_teacher(copy.deepcopy(teacher))
    samples = [DataSample().set_gt_label(i % 3) for i in range(4)]
    losses = model.loss(X[:4], samples)
    mimic = gplq_mm.distill(ours, teacher)
    found = mimic(X[:4])
    terms = [losses['loss_mimic_logits'], losses['loss_mimic_feature']]
    assert torch.equal(found, torch.stack(terms).sum())
    found.backward()
    sum(terms).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert all(torch.equal(p.grad, grads[n]) for n, p in ours.named_parameters())

    GPLQOptimWrapperConstructor({})(model).optimizer.step()
    gplq_mm.stage1_optimizer(ours, steps=390).step()
    trained = model.state_dict()
    assert all(torch.equal(v, trained[k]) for k, v in ours.state_dict().items())
