# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Units that weight PTQ finds in models of mmpretrain and mmdet, and GPTQ on all of them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from gplq_mm.convert import convert_, quantized_layers, resolve_recipe
from gplq_mm.integrations.mm.roi_features import RoIFeatures
from gplq_mm.ptq.rounding.feature_source import HeadFeatures, feature_source
from gplq_mm.ptq.stage2 import run_stage2
from gplq_mm.stream import UnitStream, find_units
from tests.helpers.mm_models import (
    CLASSIFIERS,
    DETECTORS,
    calibrate_activations,
    classifier,
    run_detector,
    tensors,
    vit_sam,
)
from tests.helpers.segmentors import SEGMENTORS

SWIN_BLOCKS = [f'backbone.stages.{s}.blocks.{b}' for s in (0, 1) for b in (0, 1)]
SWIN = ['backbone.patch_embed', *SWIN_BLOCKS[:2], 'backbone.stages.0.downsample', *SWIN_BLOCKS[2:]]
VIT = ['backbone.patch_embed', 'backbone.layers.0', 'backbone.layers.1']
RPN = [*SWIN, 'neck', 'rpn_head']
WANTED = {
    'vit': [*VIT, 'head'],
    'swin': [*SWIN, 'head'],
    'mask_rcnn': [*RPN, 'roi_head.bbox_head', 'roi_head.mask_head'],
    'upernet': [
        *SWIN,
        'decode_head.lateral_convs.0',
        'decode_head.psp_modules',
        'decode_head.bottleneck',
        'decode_head.fpn_convs.0',
        'decode_head.fpn_bottleneck',
        'decode_head.conv_seg',
    ],
    'cascade_rcnn': [*RPN, *(f'roi_head.{k}_head.{i}' for k in ('bbox', 'mask') for i in (0, 1))],
}


def prepared(name: str) -> tuple[Any, Any]:
    """A calibrated model and its pass over two images."""
    recipe = dict(base='w4a4', scope='all')
    images = torch.rand(2, 3, 32, 32)
    models = {**DETECTORS, **SEGMENTORS}
    model = classifier(name) if name in CLASSIFIERS else models[name]()
    convert_(model, recipe)
    run = pass_of(model, images)
    calibrate_activations(model, run)
    return model.eval() or model, run


def pass_of(model: Any, images: torch.Tensor) -> Callable[[], None]:
    """A pass of the model over images, one at a time."""

    def run() -> None:
        with torch.no_grad():
            for image in images:
                is_detector = hasattr(model, 'bbox_head') or hasattr(model, 'rpn_head')
                run_detector(model, image[None]) if is_detector else model(image[None])

    return run


@pytest.mark.parametrize('name', WANTED)
def test_units_are_blocks_embedding_merging_neck_and_heads_in_order(name: str) -> None:
    model, run = prepared(name)
    layers = quantized_layers(model)
    units = find_units(model, layers, run)
    assert [u.name for u in units] == WANTED[name]
    assert {n for u in units for n in u.layers} == set(layers)


@pytest.mark.parametrize('name', ['mask_rcnn', 'retinanet'])
def test_every_unit_gets_the_inputs_of_the_whole_model(name: str) -> None:
    model, run = prepared(name)
    units = find_units(model, quantized_layers(model), run)
    stream = UnitStream(model, units, run)
    for index, unit in enumerate(units):
        seen: list[Any] = []
        handle = unit.module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args))
        run()
        handle.remove()
        kept = list(stream.inputs(index))
        assert len(kept) == len(seen) > 0, unit.name
        for call, args in zip(kept, seen, strict=True):
            wanted = [t for a in args for t in (a if isinstance(a, list | tuple) else [a])]
            wanted = [t for t in wanted if isinstance(t, torch.Tensor)]
            assert all(map(torch.equal, call.tensors, wanted)), unit.name


@pytest.mark.parametrize(
    ('name', 'ptq'),
    [
        ('mask_rcnn', ['repq', dict(type='gptq', asymmetric=True), 'bias_correction', 'qwt_v2']),
        ('swin', ['gptq', dict(type='brecq', steps=2)]),
        ('swin', ['gptq', dict(type='brecq', steps=2, global_weight=0.5)]),
        ('mask_rcnn', dict(type='brecq', steps=2, global_weight=0.5, global_batches=1)),
        ('swin_v2', ['repq', 'gptq']),
        ('upernet', dict(type='brecq', steps=2, global_weight=0.5, global_batches=1)),
    ],
)
def test_combinations_run_on_real_structures_and_leave_weights_on_the_grid(
    name: str, ptq: Any
) -> None:
    model, run = prepared(name)
    run_stage2(model, resolve_recipe(dict(base='w4a4', scope='all', weight=dict(ptq=ptq))), run)
    for layer_name, layer in quantized_layers(model).items():
        assert layer.weight.isfinite().all(), layer_name
        folded = layer.folded_weight()
        codes, scale = layer.weight_quantizer.codes(folded)
        torch.testing.assert_close(codes * scale, folded, rtol=1e-5, atol=1e-7)


def test_a_segmentor_is_compared_at_the_layer_that_classifies_pixels() -> None:
    model, run = prepared('upernet')
    units = find_units(model, quantized_layers(model), run)
    source, chosen = feature_source(model, units)
    assert isinstance(source, HeadFeatures) and source.head is model.decode_head.conv_seg
    assert chosen == units


def test_vitdet_like_backbone() -> None:
    model = vit_sam()
    convert_(model, dict(base='w4a4', scope='all'))
    image = torch.rand(1, 3, 32, 32)

    def run() -> None:
        with torch.no_grad():
            model(image)

    calibrate_activations(model, run)
    units = find_units(model, quantized_layers(model), run)
    names = [u.name for u in units]
    assert names[:3] == ['patch_embed', 'layers.0', 'layers.1']
    assert {n for u in units for n in u.layers} == set(quantized_layers(model))


@pytest.mark.parametrize('name', ['mask_rcnn', 'cascade_rcnn'])
def test_global_learns_on_roi_features_at_the_proposals_of_stage_1(name: str) -> None:
    torch.manual_seed(1)
    model, run = prepared(name)
    units = find_units(model, quantized_layers(model), run)
    source, chosen = feature_source(model, units)
    assert isinstance(source, RoIFeatures) and chosen == units
    images = torch.rand(2, 3, 32, 32)
    stage1, errors, heads = model, {}, {}
    for ptq in ('mse', ['mse', dict(type='global', steps=30, batches=2)]):
        model = copy.deepcopy(stage1)
        recipe = resolve_recipe(dict(base='w4a4', scope='all', weight=dict(num_bits=3, ptq=ptq)))
        result = run_stage2(model, recipe, pass_of(model, images))
        assert result.notes == []
        errors[str(ptq)] = _roi_error(stage1, model, images[:1])
        heads[str(ptq)] = model.roi_head.state_dict()
    plain, learned = errors.values()
    assert learned < plain
    before, after = heads.values()
    assert any(not torch.equal(before[k], after[k]) for k in before if k.endswith('weight'))
    assert 'predict' not in vars(model.roi_head)


def _roi_error(stage1: Any, model: Any, image: torch.Tensor) -> float:
    """Mean relative squared error of RoI outputs at the same proposals."""
    proposals = [InstanceData(bboxes=torch.tensor([[2.0, 2.0, 20.0, 24.0], [8, 4, 30, 30]]))]
    samples = [DetDataSample(metainfo=dict(img_shape=(32, 32)))]
    with torch.no_grad():
        wanted, got = (
            tensors(m.roi_head.forward(m.extract_feat(image), proposals, samples))
            for m in (stage1, model)
        )
    errors = [(a - b).square().mean() / b.square().mean() for a, b in zip(got, wanted, strict=True)]
    return float(torch.stack(errors).mean())
