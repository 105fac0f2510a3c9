# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Units that weight PTQ finds in models of mmpretrain and mmdet, and GPTQ on all of them."""

from typing import Any

import pytest
import torch

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')

from gplq_mm.algorithms.stage2 import run_stage2
from gplq_mm.algorithms.streaming import UnitStream, find_units
from gplq_mm.conversion import convert_, quantized_layers, resolve_recipe
from tests.helpers.mm_models import (
    CLASSIFIERS,
    DETECTORS,
    calibrate_activations,
    classifier,
    run_detector,
    vit_sam,
)

SWIN_BLOCKS = [f'backbone.stages.{s}.blocks.{b}' for s in (0, 1) for b in (0, 1)]
SWIN = ['backbone.patch_embed', *SWIN_BLOCKS[:2], 'backbone.stages.0.downsample', *SWIN_BLOCKS[2:]]
VIT = ['backbone.patch_embed', 'backbone.layers.0', 'backbone.layers.1']
RPN = [*SWIN, 'neck', 'rpn_head']
WANTED = {
    'vit': [*VIT, 'head'],
    'swin': [*SWIN, 'head'],
    'mask_rcnn': [*RPN, 'roi_head.bbox_head', 'roi_head.mask_head'],
    'cascade_rcnn': [*RPN, *(f'roi_head.{k}_head.{i}' for k in ('bbox', 'mask') for i in (0, 1))],
}


def prepared(name: str, bits: int = 4) -> tuple[Any, Any]:
    """A calibrated model and its pass over two images."""
    recipe = dict(base=f'w{bits}a4', scope='all')
    images = torch.rand(2, 3, 32, 32)
    if name in CLASSIFIERS:
        model = classifier(name)
        forwards = [lambda x=x[None]: model(x) for x in images]
    else:
        model = DETECTORS[name]()
        forwards = [lambda x=x[None]: run_detector(model, x) for x in images]
    convert_(model, recipe)

    def run() -> None:
        with torch.no_grad():
            for forward in forwards:
                forward()

    calibrate_activations(model, run)
    return model.eval() or model, run


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
        ('swin_v2', ['repq', 'gptq']),
    ],
)
def test_combinations_run_on_real_structures_and_leave_weights_on_the_grid(
    name: str, ptq: Any
) -> None:
    model, run = prepared(name)
    run_stage2(model, resolve_recipe(dict(base='w4a4', scope='all', weight=dict(ptq=ptq))), run)
    for layer_name, layer in quantized_layers(model).items():
        assert layer.weight.isfinite().all(), layer_name
        codes, scale = layer.weight_quantizer.codes(layer.weight)
        torch.testing.assert_close(codes * scale, layer.weight, rtol=1e-5, atol=1e-7)


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
