# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""``tools/test.py --engine``: what computes a model's inference, by the kind of its file."""

from importlib import import_module
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from torch import Tensor, nn

from ....registry import MODELS
from ..launch.errors import ConfigError
from ..launch.preflight import check_checkpoint
from ..launch.settings_check import is_gplq
from ..model_structure import describe

TORCH_ENGINES = ('simulated', 'integer')
RUNTIMES = {'.onnx': 'onnxruntime', '.xml': 'openvino'}
"""Suffix of an exported file -> its engine."""
ENGINES = (*TORCH_ENGINES, *RUNTIMES.values())


def choose_engine(cfg: Config, config: str, file: str, engine: str | None) -> str | None:
    """The engine for a file; None if the config's own is used.

    Args:
        cfg: The config.
        config: Its path, for messages.
        file: Checkpoint, or a file of ``tools/deploy.py``.
        engine: One of ``ENGINES``, or None.

    Raises:
        ConfigError: If the engine does not run such a file, or the model is float.
    """
    runtime = RUNTIMES.get(Path(file).suffix)
    if runtime is not None:
        if engine not in (None, runtime):
            raise ConfigError(
                f'--engine {engine} does not run {file}; write --engine {runtime}, or give the '
                'checkpoint that it was written from'
            )
        if not Path(file).is_file():
            raise ConfigError(f'no file at {Path(file).absolute()}')
        if not is_gplq(cfg):
            raise ConfigError(f'{config} is float; give the GPLQ config that {file} was made with')
        return runtime
    if engine in RUNTIMES.values():
        suffix = next(s for s, name in RUNTIMES.items() if name == engine)
        raise ConfigError(
            f'--engine {engine} runs a {suffix} file, not {file}; write one with python '
            f'tools/deploy.py {config} {file} -o {Path(file).with_suffix(suffix)}'
        )
    if engine is not None and not is_gplq(cfg):
        raise ConfigError(
            f'--engine {engine} has no effect on {config}: its model is float; give a GPLQ config'
        )
    return engine


def set_inference_(cfg: Config, inference: str) -> None:
    """Set ``model.engine.inference`` of a GPLQ config; the rest of the engine is kept.

    Args:
        cfg: GPLQ config, changed in place; its model may be inside a TTA model.
        inference: ``simulated`` or ``integer``.
    """
    model = cfg.model.get('module') or cfg.model
    engine = model.get('engine') or 'fused'
    given = {'type': engine} if isinstance(engine, str) else dict(engine)
    model.engine = ConfigDict({**given, 'inference': inference})


def heads_checkpoint(cfg: Config, file: str, given: str | None) -> str | None:
    """Checkpoint of the heads that a detector's exported file does not have.

    Args:
        cfg: GPLQ config.
        file: ``.onnx`` or ``.xml`` file.
        given: ``--heads``, or None for a ``.pth`` file of the same name.

    Returns:
        Its path; None for a classifier, which is exported whole.

    Raises:
        ConfigError: If a detector's heads are missing, or a classifier is given some.
    """
    if cfg.get('default_scope') == 'mmpretrain':
        if given:
            raise ConfigError(
                f'--heads has no effect: {file} holds the whole classifier; remove it'
            )
        return None
    found = given or str(Path(file).with_suffix('.pth'))
    if not given and not Path(found).is_file():
        raise ConfigError(
            f'{file} holds backbone and neck; the heads are computed in torch: write '
            '--heads gplq_final.pth'
        )
    check_checkpoint(found)
    return found


def use_file_(model: Any, file: str) -> None:
    """Let an exported file compute a classifier, or backbone and neck of a detector.

    Args:
        model: Model with the weights of its heads; changed in place.
        file: ``.onnx`` or ``.xml`` file.

    Raises:
        ModuleNotFoundError: If the runtime is missing.
        ValueError: If the file is damaged.
    """
    facts = describe(model)
    if facts is not None and facts.is_detector:
        model.backbone = MODELS.build(dict(type='gplq_mm.DeployedBackbone', file=file, pad=True))
        model.neck = None
        return
    if not hasattr(model, 'head'):  # TimmClassifier, whose scores are the output of its `model`
        model.model = nn.Sequential(DeployedLogits(file), _Only())
        return
    model.backbone = DeployedLogits(file)
    model.neck = None
    model.head.forward = _Only().forward


class DeployedLogits(nn.Module):
    """The backbone of a classifier whose file gives the logits.

    Args:
        file: ``.onnx`` or ``.xml`` file.
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        name = 'onnx' if Path(file).suffix == '.onnx' else 'openvino'
        kind = 'OnnxModel' if name == 'onnx' else 'OpenVinoModel'
        self.run = getattr(import_module(f'gplq_mm.integrations.{name}'), kind)(file)

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """``(B, 3, H, W)`` -> one tensor of logits, ``(B, classes)``; arguments have no use."""
        return tuple(self.run(images))


class _Only(nn.Module):
    """The logits, in place of a head."""

    def forward(self, features: Any) -> Tensor:
        """``(logits,)`` or logits -> logits."""
        return features[0] if isinstance(features, tuple | list) else features
