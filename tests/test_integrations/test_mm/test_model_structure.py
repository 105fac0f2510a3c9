# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Which models count as detectors, and which features of a model are compared."""

import pytest
import torch
from torch import Tensor, nn

from gplq_mm.convert import facts_of
from gplq_mm.distillation.score_head import score_head
from gplq_mm.integrations.mm.roi_features import RoIFeatures
from gplq_mm.ptq.rounding.feature_source import FeatureSource, HeadFeatures, feature_source
from gplq_mm.stream import Unit


class Model(nn.Module):
    """A model with such children; one named after a minus sign is None, as mmdet leaves some."""

    def __init__(self, *children: str) -> None:
        super().__init__()
        for name in children:
            setattr(self, name.lstrip('-'), None if name[0] == '-' else nn.Identity())


@pytest.mark.parametrize(
    ('children', 'is_detector', 'compensates'),
    [
        (('backbone', 'neck', 'rpn_head', 'roi_head'), True, False),
        (('backbone', 'bbox_head'), True, False),
        (('backbone', '-bbox_head', 'mask_head'), True, True),
        (('backbone', 'panoptic_head'), True, True),
        (('backbone', 'head'), False, True),
        (('backbone', 'decode_head'), True, True),
        (('layers', 'roi_head'), False, False),
        (('layers',), False, True),
    ],
)
def test_detectors_have_a_backbone_and_a_head_of_mmdet(
    children: tuple[str, ...], is_detector: bool, compensates: bool
) -> None:
    facts = facts_of(Model(*children))
    assert (facts.is_detector, facts.compensates) == (is_detector, compensates)
    assert facts.scope == ('backbone' if is_detector else 'all')
    assert facts.unpaired == ('roi_head',)


@pytest.mark.parametrize(
    ('children', 'names', 'kind', 'number'),
    [
        (('backbone', 'head'), ['backbone.layers.0', 'head'], HeadFeatures, 2),
        (
            ('backbone', 'bbox_head', 'mask_head'),
            ['backbone', 'bbox_head', 'mask_head'],
            HeadFeatures,
            2,
        ),
        (('backbone', 'rpn_head', 'roi_head'), ['backbone', 'rpn_head'], HeadFeatures, 2),
        (
            ('backbone', 'rpn_head', 'roi_head'),
            ['backbone', 'rpn_head', 'roi_head.bbox_head'],
            RoIFeatures,
            3,
        ),
        (('backbone', 'head'), ['backbone.0', 'backbone.head'], FeatureSource, 2),
        (('encoder', 'heads'), ['encoder', 'heads.head'], FeatureSource, 2),
    ],
)
def test_features_are_those_of_the_first_quantized_head(
    children: tuple[str, ...], names: list[str], kind: type, number: int
) -> None:
    units = [Unit(name, nn.Identity(), {}) for name in names]
    source, reached = feature_source(Model(*children), units)
    assert type(source) is kind
    assert reached == units[:number]
    if isinstance(source, HeadFeatures) and kind is HeadFeatures:
        assert source.head is units[number - 1].module


class PooledHead(nn.Linear):
    """With the method that gives the penultimate feature."""

    def pre_logits(self, features: tuple[Tensor, ...]) -> Tensor:
        return features[-1]


def test_the_score_head_is_the_module_named_head() -> None:
    model = nn.Module()
    assert score_head(model) is None
    model.head = nn.Linear(4, 3)
    found = score_head(model)
    assert found is not None and (found.name, found.lacking) == ('head', 'Linear')
    model.head = PooledHead(4, 3)
    found, x = score_head(model), torch.randn(2, 4)
    assert found is not None and not found.lacking and not found.is_multi_label('')
    assert found.penultimate((x,))[0] is x
    model.head.thr = 0.5
    assert found.is_multi_label('')
