# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The frozen float teacher of stage 1."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ....distillation.mimic_terms import PCA_BATCH, PCA_IMAGES
from ....distillation.mimicking import Mimicking
from ....registry import MODELS
from ....stream.distributed import world
from ..checkpoints.checkpoint_io import read_checkpoint
from ..checkpoints.run_checkpoint import file_sha256, load_float_
from ..data.calibration_data import CalibrationSet

Images = Callable[[int | None], Iterable[Any]]
"""Gives this rank's batches of a number of training images, as the dataset packs them."""


def attach_teacher(
    model: nn.Module,
    source: Mapping[str, Any],
    float_state: Mapping[str, Tensor] | None,
    images: Images,
    stored: Mapping[str, Any] | None = None,
) -> None:
    """Build the float teacher and attach it to a mimicking model.

    Args:
        model: Converted model; nothing happens if it does not mimic.
        source: ``path`` and ``sha256`` of the FP32 checkpoint.
        float_state: FP32 weights of a new run; None after a resume: the checkpoint is read again
            and its hash compared.
        images: Gives batches of a number of training images, for a PCA basis.
        stored: ``mimic_state()`` of the run that is resumed: its bases are not fitted again.

    Raises:
        ValueError: If the FP32 checkpoint changed after the run began or does not fit, or a PCA
            basis cannot be fitted.
    """
    if not isinstance(model, Mimicking):
        return
    device = next(model.parameters()).device
    teacher = MODELS.build(copy.deepcopy(model.gplq.float_cfg))
    state = float_state if float_state is not None else read_float(source)
    load_float_(teacher, {'state_dict': dict(state)})
    model.attach_teacher(teacher.to(device))
    print_log(f'mimicking: {model.mimic} against {source["path"]}', logger='current')

    def batches(num_images: int | None) -> Iterator[Tensor]:
        with torch.no_grad():
            for batch in images(num_images):
                yield model.data_preprocessor(batch, False)['inputs']  # type: ignore[operator]

    model.fit_mimic(batches, stored)


def mimic_state(model: nn.Module) -> dict[str, Any]:
    """State of mimicking that a training checkpoint stores; empty without a PCA basis."""
    return model.mimic_state() if isinstance(model, Mimicking) else {}


def pca_images(calibration: CalibrationSet) -> Images:
    """Training images for a PCA basis, from the random order of the calibration set.

    Args:
        calibration: The run's calibration set.
    """

    def images(num_images: int | None) -> CalibrationSet:
        requested = min(PCA_IMAGES, len(calibration.dataset)) if num_images is None else num_images
        batch = max(1, min(PCA_BATCH, requested // world()[1]))  # a batch for every rank
        return calibration.sample(num_images, batch, PCA_IMAGES, 'mimic')

    return images


def check_mimic_images(model: nn.Module, calibration: CalibrationSet) -> None:
    """Refuse more images for a PCA basis than the training set has, before long work.

    Raises:
        ValueError: Naming both numbers.
    """
    terms = model.mimic['terms'] if isinstance(model, Mimicking) else []
    for term in terms:
        if term.get('num_images') is not None:
            pca_images(calibration)(term['num_images'])


def read_float(source: Mapping[str, Any]) -> dict[str, Tensor]:
    """FP32 weights that a run began with.

    Args:
        source: ``path`` and ``sha256`` of their checkpoint.

    Raises:
        ValueError: If the file does not exist or differs from the recorded one.
    """
    found = file_sha256(source['path'])
    if source.get('sha256') and found != source['sha256']:
        raise ValueError(
            f'the FP32 checkpoint {source["path"]} does not exist or is not the one that this run '
            'began with; mimicking needs the same teacher: put the file back'
        )
    return read_checkpoint(source['path'])['state_dict']
