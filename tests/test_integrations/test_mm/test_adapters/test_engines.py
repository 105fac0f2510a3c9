# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Every attention class and model trains alike with both engines."""

import pytest
import torch

pytest.importorskip('mmpretrain')
pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

from tests.helpers import attentions, segmentors
from tests.helpers.attentions import randomized
from tests.helpers.engines import assert_engines_agree, converted
from tests.helpers.mm_models import CLASSIFIERS, DETECTORS, classifier, run_detector, vit_sam

OF_MMSEG = {n: segmentors.ATTENTIONS[n] for n in segmentors.IN_NO_SEGMENTOR}
ATTENTIONS = {**attentions.ATTENTIONS, **OF_MMSEG}


@pytest.mark.parametrize('recipe', ['w4a4', 'gplq_w4a4_paper'])
@pytest.mark.parametrize('case', ATTENTIONS)
def test_attention(case: str, recipe: str) -> None:
    make, shape, extra = ATTENTIONS[case]
    run = lambda m, x: m(x, *extra)  # noqa: E731
    torch.manual_seed(0)
    x = torch.randn(shape)
    assert_engines_agree(converted(randomized(make()), x, run, recipe), x, run)


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_classifier(name: str) -> None:
    size = CLASSIFIERS[name][1]
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size)
    run = lambda m, x: m(x, mode='tensor')  # noqa: E731
    assert_engines_agree(converted(classifier(name), x, run), x, run)


def test_vit_sam() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 32)
    run = lambda m, x: m(x)  # noqa: E731
    assert_engines_agree(converted(vit_sam(), x, run), x, run)


@pytest.mark.parametrize('name', DETECTORS)
def test_detector(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    assert_engines_agree(converted(DETECTORS[name](), x, run_detector), x, run_detector)
