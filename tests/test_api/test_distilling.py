# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What is compared in models that are no plain classifiers."""

import copy

import pytest
import torch
from torch import Tensor, nn

import gplq_mm
from gplq_mm.distillation.losses import RelativeFeatureLoss, SoftLogitLoss
from tests.helpers.models import Detector, image
from tests.helpers.plain_vit import PlainViT, pixels

PLAIN = dict(calibration=dict(migrate=False, compensate=False))


def prepared(model: nn.Module, images: Tensor, **recipe: object) -> tuple[nn.Module, nn.Module]:
    """The calibrated model, and its teacher."""
    teacher = copy.deepcopy(model)
    gplq_mm.quantize(model, {**PLAIN, **recipe})
    gplq_mm.calibrate(model, images.split(2))
    return model, teacher


def test_a_detector_is_compared_by_the_features_of_its_neck() -> None:
    model, teacher = prepared(Detector(), image(4))
    x = image()
    features = [[net.neck(_map(net.backbone(x)))] for net in (model, teacher)]
    assert torch.equal(gplq_mm.distill(model, teacher)(x), RelativeFeatureLoss()(*features))


def _map(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (4, 4))


class MeanOfTwo(PlainViT):
    """Gives the mean of its scores over two views: no layer's output is the model's."""

    def forward(self, pixels: Tensor) -> Tensor:
        return (super().forward(pixels) + super().forward(pixels.flip(-1))) / 2


def test_without_a_penultimate_feature_the_logits_are_left() -> None:
    model, teacher = prepared(MeanOfTwo(), pixels(4))
    x = pixels(4)
    loss = gplq_mm.distill(model, teacher)(x)
    assert torch.equal(loss, SoftLogitLoss()(model(x), teacher(x)))
    model, teacher = prepared(
        MeanOfTwo(), pixels(4), mimic=dict(type='feature', layer='penultimate')
    )
    with pytest.raises(ValueError, match='so it has no penultimate feature; write'):
        gplq_mm.distill(model, teacher)(x)


def test_what_cannot_be_compared_is_refused() -> None:
    model, teacher = prepared(PlainViT(), pixels(4), mimic=None)
    with pytest.raises(ValueError, match='compares nothing'):
        gplq_mm.distill(model, teacher)
    loader = [(pixels(4), torch.zeros(4).long())]
    assert gplq_mm.train_stage1(model, teacher, loader)[0] > 0  # the task loss alone
    model, teacher = prepared(PlainViT(), pixels(4), mimic=dict(type='pca'))
    with pytest.raises(ValueError, match='needs images for its basis'):
        gplq_mm.distill(model, teacher)(pixels(4))
    model, teacher = prepared(PlainViT(), pixels(4), mimic=dict(type='feature', layer='blocks.7'))
    with pytest.raises(ValueError, match="layer='blocks.7' names no module"):
        gplq_mm.distill(model, teacher)


def test_labels_of_their_own() -> None:
    model, teacher = prepared(PlainViT(), pixels(4), mimic=dict(type='logits'))
    x = pixels(4)
    loss = gplq_mm.distill(model, teacher, multi_label=True)(x)
    assert torch.equal(loss, SoftLogitLoss(multi_label=True)(model(x), teacher(x)))
