# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Transfer to another data set: linear probes of a quantized and of the FP32 backbone."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor, nn

from ....analysis.linear_probe import ProbeSettings, probe_accuracy, train_linear_probe
from ....distillation.mimic_features import penultimate, require_pre_logits
from ..checkpoints.quantized_model import QuantizedSource
from ..data.calibration_data import with_pipeline
from ..launch.library_ways import set_mmpretrain_dataloaders
from ..run.evaluate import evaluate

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TransferResult:
    """Top-1 accuracies in percent, one per seed.

    Attributes:
        fp32: Probes of the FP32 backbone.
        quantized: Probes of the quantized backbone.
        seeds: Seeds of the probes.
        protocol: Description of the training.
    """

    fp32: list[float]
    quantized: list[float]
    seeds: list[int]
    protocol: str

    @property
    def difference(self) -> float:
        """Mean quantized minus mean FP32 accuracy, in points."""
        return sum(self.quantized) / len(self.seeds) - sum(self.fp32) / len(self.seeds)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), 'difference': self.difference}

    def table(self) -> str:
        """The result as a text table."""
        rows = [
            (f'seed {seed}', self.fp32[i], self.quantized[i]) for i, seed in enumerate(self.seeds)
        ]
        if len(rows) > 1:
            fp32, quantized = (sum(v) / len(rows) for v in (self.fp32, self.quantized))
            rows.append(('mean', fp32, quantized))
        lines = [f'{"":8} {"FP32 probe":>12} {"quantized":>12} {"difference":>12}']
        lines += [f'{name:8} {a:12.2f} {b:12.2f} {b - a:+12.2f}' for name, a, b in rows]
        return '\n'.join([f'linear probe, top-1 in percent ({self.protocol})', *lines])


def transfer(
    data: Config,
    checkpoint: str,
    *,
    model: Mapping[str, Any] | None = None,
    fp32_checkpoint: str | None = None,
    seeds: Sequence[int] = (0,),
    settings: ProbeSettings | None = None,
    device: str | None = None,
) -> TransferResult:
    """Probe a quantized backbone and its FP32 counterpart on features extracted once.

    The paper's protocol without augmentation and stochastic depth, which need a forward pass of
    the backbone in every epoch; ``transfer_by_training`` follows the paper exactly.

    Args:
        data: Config with ``train_dataloader`` and ``val_dataloader`` (``test_dataloader`` if
            absent); training images are read with the test pipeline.
        checkpoint: ``gplq_final.pth`` of a GPLQ run.
        model: Model config, for a checkpoint that does not hold it.
        fp32_checkpoint: Checkpoint of the FP32 backbone; the recorded one if None.
        seeds: One probe per seed and backbone.
        settings: Epochs, learning rate, batch size; the paper's if None.
        device: Where the backbone runs; CUDA if there is one.

    Raises:
        FileNotFoundError: If a checkpoint or the data are missing.
        ValueError: If the checkpoint is float, uncalibrated or of another model.
    """
    source = QuantizedSource(checkpoint, model)
    quantized = probe(source.quantized(), data, seeds=seeds, settings=settings, device=device)
    twin = source.float_twin(fp32_checkpoint)
    fp32 = probe(twin, data, seeds=seeds, settings=settings, device=device)
    epochs = (settings or ProbeSettings()).epochs
    protocol = f'{epochs} epochs on features of unaugmented images'
    return TransferResult(fp32, quantized, list(seeds), protocol)


def probe(
    network: nn.Module,
    data: Config,
    *,
    seeds: Sequence[int] = (0,),
    settings: ProbeSettings | None = None,
    device: str | None = None,
) -> list[float]:
    """Probe one classifier's backbone, quantized or float; its weights do not change.

    Returns:
        Top-1 accuracy in percent for each seed.
    """
    settings = settings or ProbeSettings()
    (features, labels), test = extract_features(network, data, device)
    num_classes = int(data.get('num_classes') or labels.max() + 1)
    heads = (train_linear_probe(features, labels, num_classes, settings, seed) for seed in seeds)
    return [probe_accuracy(head, *test) for head in heads]


def extract_features(
    network: nn.Module, data: Config, device: str | None = None
) -> tuple[Split, Split]:
    """Penultimate features and labels of the training and of the test images.

    Args:
        network: Classifier whose ``head`` has ``pre_logits``.
        data: See ``transfer``.
        device: See ``transfer``.

    Returns:
        Two pairs of features ``(N, C)`` and labels ``(N,)``.

    Raises:
        ValueError: If a dataloader is missing, or the network has no such feature.
    """
    try:
        require_pre_logits(network)
    except TypeError as error:
        raise ValueError(
            f'{type(network).__name__} has no head with pre_logits(), hence no feature to probe'
        ) from error
    data = copy.deepcopy(data)
    set_mmpretrain_dataloaders(data)
    reference = data.get('val_dataloader') or data.get('test_dataloader')
    if not data.get('train_dataloader') or not reference:
        raise ValueError('a probe needs train_dataloader and val_dataloader (or test_dataloader)')
    pipeline = reference.dataset.pipeline
    training = {**reference, 'dataset': with_pipeline(data.train_dataloader.dataset, pipeline)}
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    network.to(device).eval()
    train, test = (_features(network, loader) for loader in (training, reference))
    return train, test


@torch.no_grad()
def _features(network: Any, loader_cfg: Mapping[str, Any]) -> Split:
    once = {**copy.deepcopy(dict(loader_cfg)), 'persistent_workers': False}
    loader = Runner.build_dataloader(once, seed=0)
    features, labels = [], []
    for batch in loader:
        batch = network.data_preprocessor(batch, False)
        features.append(penultimate(network, _extract(network, batch['inputs'])))
        labels += [sample.gt_label for sample in batch['data_samples']]
    print_log(f'extracted {len(labels)} features', logger='current')
    return torch.cat(features).float(), torch.cat(labels)


def _extract(network: Any, inputs: Tensor) -> Any:
    """The backbone's features; an error of the image size is explained."""
    try:
        return network.extract_feat(inputs)
    except (AssertionError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        size = 'x'.join(str(n) for n in inputs.shape[-2:])
        own = getattr(network.backbone, 'img_size', None)
        hint = f', it was built for {own}' if own is not None else ''
        raise ValueError(
            f'{type(network.backbone).__name__} does not run on images of {size}{hint}: {error}; '
            'write --cfg-options image_size=N'
        ) from error


def transfer_by_training(cfg: Config, checkpoint: str, seeds: Sequence[int]) -> TransferResult:
    """Train both probes as the config says, with augmentation and stochastic depth.

    Args:
        cfg: Config whose model is a ``gplq_mm.LinearProbe``, with its ``work_dir``.
        checkpoint: ``gplq_final.pth`` of a GPLQ run.
        seeds: One run per seed and backbone.

    Raises:
        ValueError: See ``gplq_mm.LinearProbe``.
    """
    scores: dict[bool, list[float]] = {False: [], True: []}
    for quantized, found in scores.items():
        for seed in seeds:
            own = copy.deepcopy(cfg)
            own.model.update(checkpoint=checkpoint, quantized=quantized)
            name = f'{"quantized" if quantized else "fp32"}_seed{seed}'
            own.work_dir = str(Path(cfg.work_dir) / name)
            own.experiment_name = f'{Path(cfg.work_dir).name}_{name}'
            own.randomness = dict(seed=seed)
            runner = Runner.from_cfg(own)
            runner.train()
            found.append(_top1(evaluate(runner, runner.val_loop, name)))
    epochs = cfg.train_cfg.max_epochs
    return TransferResult(scores[False], scores[True], list(seeds), f'{epochs} epochs of training')


def _top1(metrics: Mapping[str, float]) -> float:
    names = [name for name in metrics if name.endswith('accuracy/top1')] or list(metrics)
    return metrics[names[0]]
