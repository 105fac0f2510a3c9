# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Models, batches and engines of the stage-1 benchmark."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from gplq_mm.analysis.start_error import float_state_of
from gplq_mm.calibration.activation_ranges import calibrate_activations
from gplq_mm.compat.torch import learnable_fake_quantize
from gplq_mm.integrations.mm.run.teacher import attach_teacher
from gplq_mm.ops import set_engine
from gplq_mm.quantizers import FakeQuantizer

Batch = dict[str, Any]
MakeBatch = Callable[[int, int, int], Batch]


@dataclass
class Workload:
    """A model to train.

    Attributes:
        name: Row name.
        scope: Registry scope of the model's config.
        model: Config of the float model.
        batch: ``batch(images, height, width)``; the size is in tokens for plain blocks.
        size: Default height and width.
        mimic: Recipe setting of the teacher's loss.
        recipe: Preset.
    """

    name: str
    scope: str
    model: Any
    batch: MakeBatch
    size: tuple[int, int]
    mimic: Any
    recipe: Any = 'w4a4'

    def build(self, engine: str, teacher: bool, options: dict[str, Any]) -> nn.Module:
        """The model in training mode; stage 1 is calibrated on random images.

        Args:
            engine: ``float``, ``reference``, ``torchao`` or ``fused``.
            teacher: Whether a float teacher's loss is added.
            options: Options of the fused engine.
        """
        with DefaultScope.overwrite_default_scope(self.scope):
            torch.manual_seed(0)
            if engine == 'float':
                model = MODELS.build(copy.deepcopy(self.model))
                model.init_weights()
                return model.train()
            recipe = {'base': self.recipe, 'mimic': self.mimic if teacher else None}
            cfg = ConfigDict(type='gplq_mm.GPLQ', model=copy.deepcopy(self.model), recipe=recipe)
            model = MODELS.build(cfg)
            model.init_weights()
            state = float_state_of(model)
            self._calibrate(model)
            if teacher:
                attach_teacher(model, {'path': 'random weights'}, state, lambda number: [])
        if engine == 'torchao':
            use_torchao(model)
        set_engine(model, {'type': 'fused', **options} if engine == 'fused' else 'reference')
        return model.train()

    def _calibrate(self, model: Any) -> None:
        batch = model.data_preprocessor(self.batch(1, *self.size), True)

        def run_pass() -> None:
            with torch.no_grad():
                if model.gplq.is_detector:
                    model.extract_feat(batch['inputs'])
                else:
                    model(**batch, mode='tensor')

        model.eval()
        calibrate_activations(model, run_pass)


class TorchAOQuantizer(FakeQuantizer):
    """An activation quantizer that calls torch's learnable fake quantize.

    It is the operator below ``torch.ao.quantization._learnable_fake_quantize``, with the
    same scale, range and gradient factor as this package's quantizer.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Values on the grid."""
        if not self.is_active or self.scale.dim():
            return super().forward(x)
        qmin, qmax = self.spec.quant_range
        factor = 1 / math.sqrt(max(x.numel(), 1) * max(qmax, 1))
        return learnable_fake_quantize(
            x, self.scale.view(1), self.zero_point.view(1), qmin, qmax, factor
        )


def use_torchao(model: nn.Module) -> None:
    """Replace every activation quantizer by torch's learnable fake quantize."""
    for module in model.modules():
        if type(module) is FakeQuantizer and module.kind == 'activation':
            module.__class__ = TorchAOQuantizer


@MODELS.register_module(name='StageOneBlocks')
class Blocks(BaseModel):
    """Stack of mmpretrain's transformer blocks; the loss itself saves no tensors."""

    def __init__(self, depth: int, dims: int, heads: int, **options: Any) -> None:
        super().__init__(**options)
        from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer

        self.layers = nn.Sequential(
            *(TransformerEncoderLayer(dims, heads, 4 * dims) for _ in range(depth))
        )

    def extract_feat(self, inputs: Tensor) -> Tensor:
        """``(B, N, C)`` -> same."""
        return self.layers(inputs)

    def loss(self, inputs: Tensor, data_samples: Any = None) -> dict[str, Tensor]:
        """Mean of the output."""
        return {'loss': self.extract_feat(inputs).mean()}

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Any:
        """Features, or losses."""
        return self.loss(inputs, data_samples) if mode == 'loss' else self.extract_feat(inputs)


def tokens_batch(channels: int) -> MakeBatch:
    """Random tokens of a model without patch embedding."""

    def make(images: int, height: int, width: int) -> Batch:
        return {'inputs': torch.randn(images, height * width, channels), 'data_samples': None}

    return make


def labelled_batch(images: int, height: int, width: int) -> Batch:
    """Random images, each with a class."""
    from mmpretrain.structures import DataSample

    inputs = [torch.randint(0, 256, (3, height, width), dtype=torch.uint8) for _ in range(images)]
    samples = [DataSample().set_gt_label(i % 1000) for i in range(images)]
    return {'inputs': inputs, 'data_samples': samples}


def annotated_batch(images: int, height: int, width: int) -> Batch:
    """Random images, each with a few boxes and masks."""
    from mmdet.testing import demo_mm_inputs

    shapes = [(3, height, width)] * images
    return demo_mm_inputs(images, shapes, num_items=[8] * images, num_classes=80, with_mask=True)


def _from_library(name: str) -> Any:
    cfg = get_config(name).model
    cfg.pop('init_cfg', None)
    cfg.backbone.pop('init_cfg', None)
    cfg.pop('train_cfg', None) if name.startswith('mmpretrain') else None
    return cfg


def _vit_blocks(depth: int) -> Workload:
    model = ConfigDict(type='StageOneBlocks', depth=depth, dims=192, heads=3)
    mimic = dict(type='feature')
    batch = tokens_batch(192)
    return Workload('vit_blocks_197x192', 'mmpretrain', model, batch, (1, 197), mimic)


def _classifier(name: str, config: str) -> Workload:
    model = _from_library(f'mmpretrain::{config}')
    mimic = dict(type='auto')
    return Workload(name, 'mmpretrain', model, labelled_batch, (224, 224), mimic)


def _detector(name: str, model: Any, size: tuple[int, int]) -> Workload:
    return Workload(name, 'mmdet', model, annotated_batch, size, dict(type='auto'))


def _vitdet() -> Any:
    from pathlib import Path

    root = Path(__file__).parents[2]
    return Config.fromfile(root / 'configs/gplq/_base_/mask_rcnn_vit-b_coco.py').model


WORKLOADS: dict[str, Callable[[], Workload]] = {
    'vit_blocks_197x192': lambda: _vit_blocks(4),
    'vit_s_224': lambda: _classifier('vit_s_224', 'deit/deit-small_4xb256_in1k.py'),
    'swin_t_224': lambda: _classifier('swin_t_224', 'swin_transformer/swin-tiny_16xb64_in1k.py'),
    'mask_rcnn_vitdet_b': lambda: _detector('mask_rcnn_vitdet_b', _vitdet(), (1024, 1024)),
    'mask_rcnn_swin_t': lambda: _detector(
        'mask_rcnn_swin_t',
        _from_library('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'),
        (800, 1344),
    ),
}
"""Models built without weights, by row name."""
