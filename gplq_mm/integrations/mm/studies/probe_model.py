# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The builder of ``type='gplq_mm.LinearProbe'``: a frozen backbone with a new linear head."""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmengine.registry import DefaultScope
from torch import nn

from ....ops import swap_class
from ....registry import MODELS
from ..checkpoints.quantized_model import QuantizedSource

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class LinearProbing(_Base):
    """Mixin: everything but the head is frozen, stays in evaluation mode and keeps its weights.

    Stochastic depth stays active while the probe trains (rate 0.1 in the paper).
    """

    head: Any

    def train(self, mode: bool = True) -> Any:
        """Set the mode of the head and of stochastic depth only."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
            for part in module.modules():
                if type(part).__name__ == 'DropPath':
                    part.train(mode)
        return self

    def init_weights(self) -> None:
        """Initialise the head only; the backbone's weights are loaded already."""
        self.head.init_weights()

    def extract_feat(self, *args: Any, **kwargs: Any) -> Any:
        """Features without gradients, so computed with integer codes, as in a test."""
        with torch.no_grad():
            return super().extract_feat(*args, **kwargs)  # type: ignore[misc]

    def _frozen(self) -> Iterator[nn.Module]:
        return (module for name, module in self.named_children() if name != 'head')


@MODELS.register_module(name='LinearProbe')
def build_linear_probe(
    num_classes: int,
    checkpoint: str | None = None,
    quantized: bool = True,
    fp32_checkpoint: str | None = None,
    drop_path_rate: float = 0.0,
    head: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    data_preprocessor: Any = None,
) -> nn.Module:
    """Build a classifier on the frozen backbone of a finished GPLQ run.

    Backbone and neck keep their quantizers, scales and integer weights, in training and in
    test; the new head is float. Images are normalised as in the backbone's own model.

    Args:
        num_classes: Classes of the new data set.
        checkpoint: ``gplq_final.pth`` of the run.
        quantized: False: build the same probe on the FP32 backbone that the run began with.
        fp32_checkpoint: Checkpoint of the FP32 backbone; the recorded one if None.
        drop_path_rate: Stochastic depth while the probe is trained.
        head: Config of the head; the model's own with ``num_classes`` and no hidden layer if None.
        model: Model config, for a checkpoint that does not hold it.
        data_preprocessor: Passed by MMEngine's runner; not used.

    Returns:
        A classifier of the model's own class.

    Raises:
        FileNotFoundError: If a checkpoint is missing.
        ValueError: If no checkpoint is given, or it is float, uncalibrated or of another model.
    """
    if not checkpoint:
        raise ValueError(
            'gplq_mm.LinearProbe needs a quantized backbone, model.checkpoint is not set; write '
            '--cfg-options model.checkpoint=work_dirs/X/gplq_final.pth'
        )
    source = QuantizedSource(checkpoint, model, {'train_cfg': None})
    if drop_path_rate and _takes(source, 'drop_path_rate'):
        source.float_cfg['backbone']['drop_path_rate'] = drop_path_rate
    elif drop_path_rate:
        print_log(
            f'drop_path_rate={drop_path_rate}: the backbone has no such argument', logger='current'
        )
    network = source.quantized() if quantized else source.float_twin(fp32_checkpoint)
    new_head = head or _linear_head(source.float_cfg.get('head'), num_classes)
    with DefaultScope.overwrite_default_scope(source.scope):
        network.head = MODELS.build(copy.deepcopy(ConfigDict(new_head)))
    return freeze_(network)


def freeze_(network: nn.Module) -> nn.Module:
    """Freeze all but ``head``, in place; see ``LinearProbing``."""
    network.requires_grad_(False)
    network.head.requires_grad_(True)
    cls = type(network)
    namespace = {'__module__': cls.__module__}
    swap_class(network, type(cls.__name__, (LinearProbing, cls), namespace))
    network.train(network.training)
    return network


def _takes(source: QuantizedSource, argument: str) -> bool:
    """Whether the backbone's constructor, or a base class it calls, has an argument."""
    with MODELS.switch_scope_and_registry(source.scope) as registry:
        backbone = registry.get(source.float_cfg['backbone']['type'])
    return any(argument in inspect.signature(c.__init__).parameters for c in backbone.__mro__)


def _linear_head(cfg: Mapping[str, Any] | None, num_classes: int) -> dict[str, Any]:
    """The model's own type of head if that is linear, for another number of classes."""
    if not cfg:
        raise ValueError(
            "the model has no head to copy; write head=dict(type='LinearClsHead', "
            f'num_classes={num_classes}, in_channels=...)'
        )
    if re.search('Stacked|MultiLabel|CSRA|ArcFace|MultiTask', str(cfg['type'])):
        cfg = {'type': 'LinearClsHead', 'in_channels': cfg['in_channels']}
    own = {k: v for k, v in cfg.items() if k not in ('hidden_dim', 'init_cfg')}
    return {**own, 'num_classes': num_classes, 'loss': {'type': 'CrossEntropyLoss'}}
