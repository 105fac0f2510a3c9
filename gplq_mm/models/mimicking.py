# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Stage-1 mimicking: a model whose ``loss()`` adds terms against the float teacher.

The student's class is extended when it is built, so ``isinstance``, attributes and
keys stay. The teacher is no submodule: it is neither saved, optimised nor wrapped.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..losses import PCAMimicLoss, PCAStatistics, RelativeFeatureLoss, SoftLogitLoss
from ..modules import swap_class

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object

MIMIC_TYPES = ('feature', 'pca', 'logits')
_KEYS = {'type', 'loss_weight', 'task_weight', 'temperature', 'explained_variance'}


def resolve_mimic(mimic: Mapping[str, Any] | None, is_detector: bool) -> dict[str, Any] | None:
    """Mimicking settings with the type made concrete.

    Args:
        mimic: ``recipe['mimic']``; ``auto`` means features for detectors and
            logits for classifiers, ``paper`` nothing for detectors and PCA for
            classifiers.
        is_detector: Whether the model is a detector.

    Returns:
        Settings, or None where stage 1 uses the task loss only.

    Raises:
        ValueError: For an unknown type or key, or a type that the model cannot use.
    """
    if mimic is None or mimic.get('type') is None:
        return None
    unknown = sorted(set(mimic) - _KEYS)
    if unknown:
        raise ValueError(f'recipe.mimic has no key {unknown[0]!r}; the keys are {sorted(_KEYS)}')
    settings = {'loss_weight': 1.0, 'task_weight': 1.0, **mimic}
    if settings['type'] == 'paper':
        if is_detector:
            return None
        settings['type'] = 'pca'
    if settings['type'] == 'auto':
        settings['type'] = 'feature' if is_detector else 'logits'
        if not is_detector and 'task_weight' not in mimic:
            settings['task_weight'] = 0.0
    if settings['type'] not in MIMIC_TYPES:
        allowed = ('auto', 'paper', *MIMIC_TYPES)
        raise ValueError(f'recipe.mimic.type={settings["type"]!r}: write one of {allowed}')
    if is_detector and settings['type'] != 'feature':
        raise ValueError(
            f"recipe.mimic.type={settings['type']!r} needs a classifier; write 'feature'"
        )
    return settings


class Mimicking(_Base):
    """Mixin: adds ``loss_mimic`` to the losses of a student.

    Attributes:
        mimic: Settings of ``resolve_mimic``.
    """

    mimic: dict[str, Any]
    head: Any

    def attach_teacher(self, teacher: nn.Module) -> None:
        """Give the frozen float model (kept outside the module tree)."""
        teacher.requires_grad_(False).eval()
        # a list hides the teacher from Module.__setattr__'s registration
        self.__dict__['_teacher'] = [teacher]
        self.__dict__['_mimic_loss'] = [_build_loss(self.mimic)]

    @property
    def teacher(self) -> Any:
        """The float model.

        Raises:
            RuntimeError: If none was attached.
        """
        held = self.__dict__.get('_teacher')
        if not held:
            raise RuntimeError(
                "mimicking has no teacher; add custom_hooks=[dict(type='gplq_mm.GPLQHook')]"
            )
        return held[0]

    def extract_feat(self, *args: Any, **kwargs: Any) -> Any:
        """Features, remembered while a loss is computed."""
        features = super().extract_feat(*args, **kwargs)  # type: ignore[misc]
        if self.__dict__.get('_recording'):
            self.__dict__['_features'] = features
        return features

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Any]:
        """The model's own losses plus ``loss_mimic``.

        Raises:
            TypeError: If the model's own ``loss()`` never calls ``extract_feat()``.
            RuntimeError: If no teacher was attached.
        """
        self.__dict__['_recording'] = True
        try:
            losses = super().loss(inputs, data_samples)  # type: ignore[misc]
        finally:
            self.__dict__['_recording'] = False
        losses = {k: _scaled(k, v, self.mimic['task_weight']) for k, v in losses.items()}
        with torch.no_grad():
            reference = self.teacher.extract_feat(inputs)
        student = self.__dict__.pop('_features', None)
        if student is None:
            raise TypeError(
                f'{type(self).__name__}.loss() does not call extract_feat(), which mimicking '
                'needs; write recipe=dict(mimic=None)'
            )
        losses['loss_mimic'] = self.mimic['loss_weight'] * self._mimic_term(student, reference)
        return losses

    def _mimic_term(self, student: Any, reference: Any) -> Tensor:
        loss = self.__dict__['_mimic_loss'][0]
        if self.mimic['type'] == 'feature':
            return loss(_as_levels(student), _as_levels(reference))
        if self.mimic['type'] == 'pca':
            return loss(penultimate(self, student), penultimate(self.teacher, reference))
        with torch.no_grad():
            target = self.teacher.head(reference)
        return loss(_as_logits(self.head(student)), _as_logits(target))

    def fit_pca(
        self, run_features: Callable[[Callable[[Tensor], None]], None], reduce: Callable
    ) -> None:
        """Fit the PCA basis on the teacher's features.

        Args:
            run_features: Calls its argument with preprocessed inputs, batch by batch.
            reduce: Sums a tensor over ranks in place.

        Raises:
            ValueError: If there are fewer images than components.
        """
        statistics: list[PCAStatistics] = []

        def add(inputs: Tensor) -> None:
            with torch.no_grad():
                features = penultimate(self.teacher, self.teacher.extract_feat(inputs))
            if not statistics:
                statistics.append(PCAStatistics(features.shape[-1], features.device))
            statistics[0].update(features)

        run_features(add)
        for tensor in statistics[0].tensors():
            reduce(tensor)
        components = statistics[0].components(self.mimic.get('explained_variance', 0.6))
        self.__dict__['_mimic_loss'] = [PCAMimicLoss(components)]


def make_mimicking(model: nn.Module, mimic: dict[str, Any]) -> None:
    """Extend the class of ``model`` with ``Mimicking``, in place.

    Raises:
        TypeError: If the model has no ``extract_feat`` or ``loss``, or no head that
            gives what the type compares.
    """
    for method in ('extract_feat', 'loss'):
        if not hasattr(model, method):
            raise TypeError(
                f'{type(model).__name__} has no {method}(), which mimicking needs; '
                'write recipe=dict(mimic=None)'
            )
    if mimic['type'] == 'pca':
        _require_pre_logits(model)
    if mimic['type'] == 'logits' and getattr(model, 'head', None) is None:
        raise TypeError(
            f'{type(model).__name__} has no head whose logits could be compared; '
            'write recipe=dict(mimic=None)'
        )
    cls = type(model)
    swap_class(model, type(cls.__name__, (Mimicking, cls), {'__module__': cls.__module__}))
    model.mimic = mimic  # type: ignore[assignment]


def penultimate(model: Any, features: Any) -> Tensor:
    """Input of a classifier's last layer, ``(N, C)``.

    Raises:
        TypeError: If the head has no ``pre_logits``.
    """
    _require_pre_logits(model)
    feature = model.head.pre_logits(features)
    return feature[0] if isinstance(feature, tuple | list) else feature


def _require_pre_logits(model: Any) -> None:
    head = getattr(model, 'head', None)
    if head is None or not hasattr(head, 'pre_logits'):
        raise TypeError(
            f'{type(head).__name__} has no pre_logits(), so it has no penultimate feature; '
            "write recipe=dict(mimic=dict(type='logits'))"
        )


def _build_loss(mimic: dict[str, Any]) -> nn.Module | None:
    if mimic['type'] == 'feature':
        return RelativeFeatureLoss()
    if mimic['type'] == 'logits':
        return SoftLogitLoss(mimic.get('temperature', 1.0))
    return None  # PCA needs a basis first, see fit_pca


def _as_levels(features: Any) -> list[Tensor]:
    return list(features) if isinstance(features, tuple | list) else [features]


def _as_logits(logits: Any) -> Tensor:
    """One tensor also where a distilled head gives two (class and distillation token)."""
    if isinstance(logits, tuple | list):
        return torch.stack([x.float() for x in logits]).mean(0)
    return logits


def _scaled(name: str, value: Any, weight: float) -> Any:
    if weight == 1.0 or 'loss' not in name:
        return value
    return [v * weight for v in value] if isinstance(value, list) else value * weight
