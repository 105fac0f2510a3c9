# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Models and images of the inference benchmark: float, quantized, and the part that is exported."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.runner import Runner
from torch import Tensor, nn

import gplq_mm
from gplq_mm.integrations.loading import load_adapters_of
from gplq_mm.integrations.mm.checkpoints.quantized_model import QuantizedSource
from gplq_mm.integrations.mm.launch.config import apply_cfg_options

PROPOSALS, DETECTIONS = 1000, 20
"""A detector with random weights keeps exactly so many, so that its heads always do equal work."""
_CHEAP = {
    'calibration': {'num_images': 4, 'batch_size': 1, 'migrate': False, 'compensate': False},
    'mimic': None,
    'gate': None,
}


@dataclass
class Case:
    """A model of the benchmark.

    Attributes:
        name: Row name.
        size: Height and width of the images.
        batches: Batch sizes that are measured by default.
        task: ``classifier`` or ``detector``.
        weights: ``random``, or the checkpoint's file name.
        build_float: Builds the float model in evaluation mode.
        build_quantized: Builds the quantized one from the folder of its files.
        images: ``images(number)``: normalized images ``(N, 3, H, W)`` with the meta data of each.
    """

    name: str
    size: tuple[int, int]
    batches: tuple[int, ...]
    task: str
    weights: str
    build_float: Callable[[], Any]
    build_quantized: Callable[[Path], Any]
    images: Callable[[int], tuple[Tensor, list[dict[str, Any]]]]


def random_case(name: str, recipe: Any) -> Case:
    """A model of the libraries with random weights, of ``MODELS_BY_NAME``."""
    library, path, size, batches = MODELS_BY_NAME[name]
    task = 'detector' if library == 'mmdet' else 'classifier'
    chosen = cheap_recipe(recipe, task)

    def build_float() -> Any:
        return _build_float(library, path)

    def build_quantized(folder: Path) -> Any:
        model, file = build_float(), folder / 'quantized.pth'
        if file.is_file():
            return gplq_mm.load(file, model)
        quantize_on_images(model, chosen, *random_images(4, size))
        gplq_mm.save(model, file)
        return model

    def images(number: int) -> tuple[Tensor, list[dict[str, Any]]]:
        return random_images(number, size)

    return Case(name, size, batches, task, 'random', build_float, build_quantized, images)


def cheap_recipe(recipe: Any, task: str) -> dict[str, Any]:
    """A recipe whose weights are rounded to nearest; a detector's whole model is its scope."""
    scope = {'scope': 'all'} if task == 'detector' else {}
    return {'base': recipe, 'weight': {'ptq': 'minmax'}, **_CHEAP, **scope}


def random_images(number: int, size: tuple[int, int]) -> tuple[Tensor, list[dict[str, Any]]]:
    """Normally distributed pixels, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    about = dict.fromkeys(('img_shape', 'ori_shape', 'batch_input_shape', 'pad_shape'), size)
    about['scale_factor'] = (1.0, 1.0)  # type: ignore[assignment]
    return torch.randn(number, 3, *size, generator=generator), [dict(about) for _ in range(number)]


@torch.no_grad()
def quantize_on_images(
    model: Any, recipe: Any, images: Tensor, metas: list[dict[str, Any]]
) -> None:
    """Quantize a float model in place with the functions of ``gplq_mm``."""
    gplq_mm.quantize(model, recipe)

    def loop(network: nn.Module) -> None:
        for image, about in zip(images, metas, strict=True):
            predict(network, image[None], [about])

    gplq_mm.calibrate(model, forward_loop=loop)
    gplq_mm.quantize_weights(model)
    model.eval()


def predict(model: Any, images: Tensor, metas: list[dict[str, Any]]) -> Any:
    """Logits of a classifier; predictions of a detector, boxes and masks in image coordinates.

    Args:
        model: Model in evaluation mode.
        images: ``(B, 3, H, W)``, normalized.
        metas: Meta data of each image.
    """
    if not is_detector(model):
        return model(images)
    from mmdet.structures import DetDataSample

    return model.predict(images, [DetDataSample(metainfo=dict(about)) for about in metas])


def is_detector(model: Any) -> bool:
    """Whether a model is a detector of mmdet, its backbone in torch or not."""
    heads = ('roi_head', 'rpn_head', 'bbox_head')
    return any(getattr(model, name, None) is not None for name in heads)


def as_tensors(outputs: Any) -> list[Tensor]:
    """Tensors of a model's outputs, in a fixed order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, np.ndarray):
        return [torch.from_numpy(outputs)]
    if hasattr(outputs, 'pred_instances'):
        found = outputs.pred_instances
        return [x for key in sorted(found.keys()) for x in as_tensors(found[key])]
    if isinstance(outputs, list | tuple):
        return [x for item in outputs for x in as_tensors(item)]
    return as_tensors(getattr(outputs, 'tensor', []))


class ExportedPart(nn.Module):
    """The part that is exported: a whole classifier, backbone and neck of a detector."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.is_features = model, is_detector(model)

    def forward(self, x: Tensor) -> Any:
        """``(B, 3, H, W)`` -> logits ``(B, classes)``, or feature maps."""
        return tuple(self.model.extract_feat(x)) if self.is_features else self.model(x)


def with_exported_part(model: Any, run: Callable[[Tensor], Any]) -> Any:
    """The model with its exported part computed by ``run``; the rest stays in torch."""
    if is_detector(model):
        model.extract_feat = run
        del model.backbone
        if getattr(model, 'neck', None) is not None:
            del model.neck
        return model
    model.extract_feat = run
    model.head.forward = lambda logits: logits
    del model.backbone
    return model


def _build_float(library: str, path: str) -> Any:
    cfg = get_config(f'{library}::{path}').model
    for part in (cfg, cfg.backbone):
        part.pop('init_cfg', None)
        part.pop('pretrained', None)
    if library == 'mmdet':
        cfg.test_cfg.rpn.update(max_per_img=PROPOSALS, nms=dict(type='nms', iou_threshold=1.0))
        cfg.test_cfg.rcnn.update(max_per_img=DETECTIONS)
    else:
        cfg.pop('train_cfg', None)
    MMLogger.get_instance('mmengine', log_level='ERROR')  # it logs every initialized parameter
    with DefaultScope.overwrite_default_scope(library):
        torch.manual_seed(0)
        model = MODELS.build(copy.deepcopy(cfg))
        model.init_weights()
    if library == 'mmdet':  # random scores as far apart as trained ones: some pass the threshold
        torch.nn.init.normal_(model.roi_head.bbox_head.fc_cls.weight, std=1.0)
    load_adapters_of(model)
    return model.eval()


MODELS_BY_NAME: dict[str, tuple[str, str, tuple[int, int], tuple[int, ...]]] = {
    'vit_s_224': ('mmpretrain', 'deit/deit-small_4xb256_in1k.py', (224, 224), (1, 8)),
    'swin_t_224': ('mmpretrain', 'swin_transformer/swin-tiny_16xb64_in1k.py', (224, 224), (1, 8)),
    'mask_rcnn_swin_t': (
        'mmdet',
        'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
        (480, 640),
        (1,),
    ),
}
"""Library, its config, image size and batch sizes of the models with random weights."""


def config_case(config: str, checkpoint: str, data: str | None) -> Case:
    """The model of a user's config and quantized checkpoint, with its own test images.

    Args:
        config: GPLQ config.
        checkpoint: ``gplq_final.pth`` of a run.
        data: Folder that replaces the config's ``data_root``; None keeps it.
    """
    cfg = Config.fromfile(config)
    apply_cfg_options(cfg, {'data_root': data} if data else {})
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    source = QuantizedSource(checkpoint, cfg.model)
    if source.float_cfg.get('data_preprocessor') is None and cfg.get('data_preprocessor'):
        source.float_cfg.data_preprocessor = cfg.data_preprocessor
    task = 'detector' if cfg.get('default_scope') == 'mmdet' else 'classifier'
    images = _TestImages(cfg, source)
    first, _ = images(1)
    return Case(
        Path(config).stem,
        (first.shape[-2], first.shape[-1]),
        (1, 8) if task == 'classifier' else (1,),
        task,
        Path(checkpoint).name,
        source.float_twin,
        lambda folder: source.quantized(),
        images,
    )


class _TestImages:
    """Images of a config's test set, preprocessed and padded to the largest of them."""

    def __init__(self, cfg: Any, source: QuantizedSource) -> None:
        self.cfg, self.source = cfg, source

    def __call__(self, number: int) -> tuple[Tensor, list[dict[str, Any]]]:
        loader = one_by_one(self.cfg)
        model = self.source.quantized()
        images, metas = [], []
        for batch in loader:
            data = model.data_preprocessor(batch, False)
            images.append(data['inputs'])
            metas.append(_plain(data['data_samples'][0].metainfo))
            if len(images) == number:
                break
        height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
        padded = [
            nn.functional.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])) for x in images
        ]
        for about in metas:
            about['batch_input_shape'] = (height, width)
        return torch.cat(padded), metas


def one_by_one(cfg: Any) -> Any:
    """Data loader of a config's test set, one image at a time, in its order."""
    loader = copy.deepcopy(cfg.test_dataloader)
    loader.update(num_workers=0, persistent_workers=False, batch_size=1)
    loader.pop('batch_sampler', None)
    return Runner.build_dataloader(loader, seed=0)


def _plain(metainfo: Any) -> dict[str, Any]:
    """The entries that heads read, as plain numbers."""
    kept = ('img_shape', 'ori_shape', 'batch_input_shape', 'pad_shape', 'scale_factor')
    found = {key: metainfo[key] for key in kept if key in metainfo}
    return {key: tuple(json.loads(json.dumps(list(v), default=float))) for key, v in found.items()}
