# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The frozen float teacher of stage 1."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.logging import print_log
from torch import Tensor, nn

from ..models import Mimicking
from ..registry import MODELS
from ..utils.checkpoint_io import read_checkpoint
from .calibration_data import CalibrationSet
from .checkpoint import file_sha256, load_float_


def attach_teacher(
    model: nn.Module,
    source: Mapping[str, Any],
    float_state: Mapping[str, Tensor] | None,
    calibration: CalibrationSet,
) -> None:
    """Build the float teacher and hand it to a mimicking model.

    Args:
        model: Converted model; nothing happens if it does not mimic.
        source: ``path`` and ``sha256`` of the FP32 checkpoint.
        float_state: FP32 weights where they are at hand (fresh start), else None:
            the checkpoint is read again and its hash compared.
        calibration: Images on which a PCA basis is fitted.

    Raises:
        ValueError: If the FP32 checkpoint changed since the run began, or does not fit.
    """
    if not isinstance(model, Mimicking):
        return
    device = next(model.parameters()).device
    teacher = MODELS.build(copy.deepcopy(model.gplq.float_cfg))  # type: ignore[union-attr]
    state = float_state if float_state is not None else _read_float(source)
    load_float_(teacher, {'state_dict': dict(state)})
    model.attach_teacher(teacher.to(device))
    print_log(f'mimicking: {model.mimic} against {source["path"]}', logger='current')
    if model.mimic['type'] == 'pca':
        model.fit_pca(_feature_runner(model, calibration), _sum_over_ranks)


def float_state_of(model: nn.Module, added: set[str]) -> dict[str, Tensor]:
    """Copy of a converted model's float weights, without what the conversion added."""
    return {k: v.detach().clone() for k, v in model.state_dict().items() if k not in added}


def _read_float(source: Mapping[str, Any]) -> dict[str, Tensor]:
    found = file_sha256(source['path'])
    if source.get('sha256') and found != source['sha256']:
        raise ValueError(
            f'the FP32 checkpoint {source["path"]} is gone or is not the one that this run began '
            'with; mimicking needs the same teacher: put the file back'
        )
    return read_checkpoint(source['path'])['state_dict']


def _feature_runner(
    model: Any, calibration: CalibrationSet
) -> Callable[[Callable[[Tensor], None]], None]:
    def run(add: Callable[[Tensor], None]) -> None:
        with torch.no_grad():
            for batch in calibration:
                add(model.data_preprocessor(batch, False)['inputs'])

    return run


def _sum_over_ranks(tensor: Tensor) -> None:
    all_reduce(tensor, op='sum')
