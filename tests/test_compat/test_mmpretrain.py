# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What we use of mmpretrain's internals exists."""

import pytest
import torch

pytest.importorskip('mmpretrain')
pytest.importorskip('timm')
from mmpretrain.models import CrossEntropyLoss, TimmClassifier
from mmpretrain.structures import DataSample

from gplq_mm.compat.mmpretrain import loss_of_scores


def test_loss_of_scores_is_that_of_the_classifier() -> None:
    assert hasattr(TimmClassifier, '_get_loss'), 'change gplq_mm/compat/mmpretrain.py'
    classifier = TimmClassifier(
        model_name='vit_tiny_patch16_224',
        img_size=32,
        num_classes=3,
        loss=CrossEntropyLoss(),
    )
    scores, samples = torch.randn(2, 3), [DataSample().set_gt_label(i) for i in range(2)]
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1]))
    torch.testing.assert_close(loss_of_scores(classifier, scores, samples)['loss'], expected)
