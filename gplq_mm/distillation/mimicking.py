# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Stage-1 mimicking: a mixin whose ``loss()`` adds terms that compare student and teacher.

The student's class is extended when it is built; ``isinstance``, attributes and keys do not
change. The teacher is not a submodule: it is not saved, optimised or wrapped.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..ops import swap_class
from .mimic_features import (
    Recording,
    require_layers,
    require_pre_logits,
    run_teacher,
    watched,
)
from .mimic_settings import PENULTIMATE
from .mimic_terms import PCATerm, build_term, module_names
from .score_head import score_head
from .teacher_cache import TeacherCache
from .teacher_precision import teacher_dtype

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object

Batches = Callable[[int | None], Iterable[Tensor]]
"""Called with a number of training images; returns this rank's preprocessed batches."""


class Mimicking(_Base):
    """Mixin: adds ``loss_mimic`` to the losses of a student.

    With several terms it adds one loss per term: ``loss_mimic_pca``, ``loss_mimic_logits``, ...

    Attributes:
        mimic: Settings of ``resolve_mimic``.
    """

    mimic: dict[str, Any]
    gplq: Any
    head: Any

    def attach_teacher(self, teacher: nn.Module) -> None:
        """Set the frozen float model (stored outside the module tree)."""
        teacher.requires_grad_(False).eval()
        # a list hides the teacher from Module.__setattr__'s registration
        self.__dict__['_teacher'] = [teacher]
        self.__dict__['_terms'] = [build_term(settings) for settings in self.mimic['terms']]

    def attach_cache(self, cache: TeacherCache) -> None:
        """Set a cache of the teacher's outputs."""
        self.__dict__['_cache'] = [cache]

    @property
    def needs_features(self) -> bool:
        """Whether a term compares other outputs than the head's logits."""
        return any(term['type'] != 'logits' for term in self.mimic['terms'])

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

    def fit_mimic(self, batches: Batches, stored: Mapping[str, Any] | None = None) -> None:
        """Fit the PCA bases of the terms.

        Args:
            batches: Called with a term's ``num_images``.
            stored: Result of ``mimic_state``; its bases are used for equal terms.

        Raises:
            ValueError: If there are fewer samples than components.
        """
        known = {_identity(s): c for s, c in (stored or {}).get('bases', [])}
        for term in self._pca_terms():
            if _identity(term.settings) in known:
                term.set_components(known[_identity(term.settings)])
            else:
                term.fit(self.teacher, batches(term.settings['num_images']))

    def mimic_state(self) -> dict[str, Any]:
        """State for a resume: each PCA term's settings and basis."""
        fitted = [t for t in self._pca_terms() if t.components is not None]
        return {'bases': [(dict(t.settings), t.components) for t in fitted]} if fitted else {}

    def extract_feat(self, *args: Any, **kwargs: Any) -> Any:
        """Features, recorded during the computation of a loss."""
        features = super().extract_feat(*args, **kwargs)  # type: ignore[misc]
        recording = self.__dict__.get('_recording')
        if recording is not None:
            recording.features = features
        return features

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Any]:
        """The model's losses and the mimicking terms.

        Args:
            inputs: Preprocessed batch, ``(B, 3, H, W)``.
            data_samples: Annotations of each image.

        Raises:
            TypeError: If the model's ``loss()`` does not call ``extract_feat()``.
            RuntimeError: If no teacher was attached.
        """
        teacher, student = self.teacher, Recording(self)
        terms = self.__dict__['_terms']
        layers = list(dict.fromkeys(name for term in terms for name in term.layers))
        self.__dict__['_recording'] = student
        try:
            with watched(student, layers):
                losses = super().loss(inputs, data_samples)  # type: ignore[misc]
        finally:
            self.__dict__['_recording'] = None
        if student.features is None:
            raise TypeError(
                f'{type(self).__name__}.loss() does not call extract_feat(), which mimicking '
                'needs; write recipe=dict(mimic=None)'
            )
        dtype = teacher_dtype(self.gplq.engine.teacher, inputs.device)
        cache = self.__dict__.get('_cache', [None])[0]
        run = run_teacher if cache is None else cache.run
        reference = run(teacher, inputs, layers, dtype)
        losses = {k: _scaled(k, v, self.mimic['task_weight']) for k, v in losses.items()}
        for term in terms:
            name = 'loss_mimic' if len(terms) == 1 else f'loss_mimic_{_label(term, terms)}'
            losses[name] = term.settings['loss_weight'] * term(student, reference)
        return losses

    def _pca_terms(self) -> list[PCATerm]:
        return [t for t in self.__dict__.get('_terms', []) if isinstance(t, PCATerm)]


def make_mimicking(model: nn.Module, mimic: dict[str, Any]) -> None:
    """Extend the class of ``model`` with ``Mimicking``, in place.

    Args:
        model: Converted model.
        mimic: Settings of ``resolve_mimic``.

    Raises:
        TypeError: If the model has no ``extract_feat`` or ``loss``, or no head with
            the logits that a term compares.
        ValueError: If a term names a layer that the model does not have.
    """
    for method in ('extract_feat', 'loss'):
        if not hasattr(model, method):
            raise TypeError(
                f'{type(model).__name__} has no {method}(), which mimicking needs; '
                'write recipe=dict(mimic=None)'
            )
    for term in mimic['terms']:
        require_layers(model, module_names(term))
        if term.get('layer') == PENULTIMATE:
            require_pre_logits(model)
        if term['type'] == 'logits' and score_head(model) is None:
            raise TypeError(
                f'{type(model).__name__} has no head whose logits can be compared; '
                'write recipe=dict(mimic=None)'
            )
    cls = type(model)
    swap_class(model, type(cls.__name__, (Mimicking, cls), {'__module__': cls.__module__}))
    model.mimic = mimic  # type: ignore[assignment]


def _label(term: Any, terms: list[Any]) -> str:
    """Type of a term, with its layer if two terms have the same type."""
    kind = term.settings['type']
    if sum(t.settings['type'] == kind for t in terms) == 1:
        return kind
    return f'{kind}_{term.settings["layer"] or "features"}'.replace('.', '_')


def _identity(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """Settings that a PCA basis depends on."""
    return tuple(settings.get(k) for k in ('layer', 'explained_variance', 'num_images'))


def _scaled(name: str, value: Any, weight: float) -> Any:
    if weight == 1.0 or 'loss' not in name:
        return value
    return [v * weight for v in value] if isinstance(value, list) else value * weight
