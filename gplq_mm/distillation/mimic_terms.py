# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Mimicking terms of stage 1's loss."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .losses import PCAMimicLoss, RelativeFeatureLoss, SoftLogitLoss
from .mimic_features import Recording, run_teacher
from .mimic_settings import PENULTIMATE
from .score_head import SCORES
from .streaming_pca import PCAStatistics

PCA_IMAGES = 1024
"""Number of images for a PCA basis if the recipe does not set it."""
PCA_BATCH = 16
"""Images per forward pass for the fit of a PCA basis."""


class FeatureTerm:
    """Relative squared error of feature maps.

    Every term has ``settings`` and ``layers``, the names of the modules whose outputs it uses.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.layers = module_names(settings)
        self.loss = RelativeFeatureLoss()

    def __call__(self, student: Recording, teacher: Recording) -> Tensor:
        """The unweighted loss of a student's and a teacher's forward pass, a scalar."""
        layer = self.settings['layer']
        return self.loss(student.levels(layer), teacher.levels(layer))


class LogitsTerm:
    """Divergence of softened class distributions, summed over the tasks of the head."""

    layers = (SCORES,)

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.of_one = SoftLogitLoss(settings['temperature'])
        self.of_several = SoftLogitLoss(settings['temperature'], multi_label=True)

    def __call__(self, student: Recording, teacher: Recording) -> Tensor:
        """The unweighted loss of a student's and a teacher's forward pass, a scalar."""
        student_values, teacher_values = student.logits(), teacher.logits()
        losses = [
            (self.of_several if student.is_multi_label(task) else self.of_one)(
                student_values[task], teacher_values[task]
            )
            for task in teacher_values
        ]
        return torch.stack(losses).sum()


class PCATerm:
    """Squared error in the leading principal components of the teacher's features.

    Attributes:
        components: Basis ``(C, K)``, float32; None until it is fitted.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.layers = module_names(settings)
        self.components: Tensor | None = None
        self._loss: PCAMimicLoss | None = None

    def fit(
        self,
        teacher: Any,
        batches: Iterable[Any],
        run: Callable[..., Recording] = run_teacher,
    ) -> None:
        """Fit the basis.

        Args:
            teacher: The float model, in evaluation mode.
            batches: This rank's preprocessed images.
            run: Returns a recording for a teacher, a batch and names of layers.

        Raises:
            ValueError: If there are fewer samples than components.
        """
        statistics: PCAStatistics | None = None
        for inputs in batches:
            features = run(teacher, inputs, self.layers).samples(self.settings['layer'])
            if statistics is None:
                statistics = PCAStatistics(features.shape[-1], features.device)
            statistics.update(features)
        assert statistics is not None, 'every rank has a batch, see CalibrationSet'
        statistics.reduce()
        self.set_components(statistics.components(self.settings['explained_variance']))

    def set_components(self, components: Tensor) -> None:
        """Use a basis ``(C, K)``."""
        self.components = components.float().cpu()
        self._loss = PCAMimicLoss(self.components)

    def __call__(self, student: Recording, teacher: Recording) -> Tensor:
        """The unweighted loss of a student's and a teacher's forward pass, a scalar.

        Raises:
            RuntimeError: If the basis was not fitted.
        """
        if self._loss is None:
            raise RuntimeError(
                "the PCA basis was never fitted; add custom_hooks=[dict(type='gplq_mm.GPLQHook')]"
            )
        layer = self.settings['layer']
        student_values, teacher_values = student.samples(layer), teacher.samples(layer)
        return self._loss.to(student_values.device)(student_values, teacher_values)


def build_term(settings: Mapping[str, Any]) -> FeatureTerm | LogitsTerm | PCATerm:
    """The term that settings of ``resolve_mimic`` describe."""
    if settings['type'] == 'feature':
        return FeatureTerm(settings)
    return LogitsTerm(settings) if settings['type'] == 'logits' else PCATerm(settings)


def module_names(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the modules whose outputs a term uses: one or none."""
    layer = settings.get('layer')
    return () if layer in (None, PENULTIMATE) else (str(layer),)
