# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What the recipe's ``mimic`` means for a model: one or several terms of stage 1's loss."""

from collections.abc import Mapping, Sequence
from typing import Any

MIMIC_TYPES = ('feature', 'pca', 'logits')
PENULTIMATE = 'penultimate'
_KEYS: dict[str, Any] = {
    'type': None,
    'loss_weight': 1.0,
    'task_weight': None,
    'layer': None,
    'temperature': 1.0,
    'explained_variance': 0.6,
    'num_images': None,
}
_OF_TYPE = {
    'feature': ('layer',),
    'pca': ('layer', 'explained_variance', 'num_images'),
    'logits': ('temperature',),
}

Mimic = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None


def resolve_mimic(
    mimic: Mimic, is_detector: bool, has_penultimate: bool = True
) -> dict[str, Any] | None:
    """Mimicking settings with the types made concrete.

    Args:
        mimic: ``recipe['mimic']``: one term as a dict, or several as a list. Keys of a
            term:

            - ``type``: ``feature``, ``pca`` or ``logits``; ``auto`` means features for
              detectors, and for classifiers logits and the penultimate feature; ``paper``
              nothing for detectors and PCA for classifiers.
            - ``loss_weight``: Factor of the term (the paper's alpha).
            - ``task_weight``: Factor of the model's own losses; one value for all terms.
            - ``layer``: What ``feature`` and ``pca`` compare: ``penultimate`` (PCA's
              default), a module's name, or None for ``extract_feat()`` (of ``feature``).
            - ``temperature``: Of ``logits``.
            - ``explained_variance``: Share of the variance that the PCA basis keeps.
            - ``num_images``: Training images for that basis; None for 1024, or all where
              there are fewer.
        is_detector: Whether the model is a detector.
        has_penultimate: Whether the model has a penultimate feature; ``auto`` leaves that
            term out where it has none.

    Returns:
        ``task_weight`` and ``terms``, or None where stage 1 uses the task loss only.

    Raises:
        ValueError: For an unknown type or key, a value out of range, or a type that the
            model cannot use.
    """
    given = [mimic] if isinstance(mimic, Mapping) else list(mimic or [])
    wanted = [t for term in given for t in _expanded(term, is_detector, has_penultimate)]
    found = [_term(term, is_detector) for term in wanted]
    terms = [term for term in found if term is not None]
    if not terms:
        return None
    kinds = [(term['type'], term.get('layer')) for term in terms]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f'recipe.mimic={mimic!r}: two terms compare the same; give one of them')
    weights = {term.pop('task_weight') for term in terms} - {None}
    if len(weights) > 1:
        raise ValueError(f'recipe.mimic: task_weight is {sorted(weights)}; give one value')
    return {'task_weight': weights.pop() if weights else 1.0, 'terms': terms}


def _expanded(term: Any, is_detector: bool, has_penultimate: bool) -> list[Any]:
    """The terms that ``auto`` stands for."""
    if not isinstance(term, Mapping) or term.get('type') != 'auto':
        return [term]
    if is_detector:
        return [{**term, 'type': 'feature'}]
    logits = {**term, 'type': 'logits', 'layer': None}
    if not has_penultimate:
        return [logits]
    layer = term.get('layer') or PENULTIMATE
    return [logits, {**term, 'type': 'feature', 'layer': layer, 'task_weight': None}]


def _term(term: Any, is_detector: bool) -> dict[str, Any] | None:
    if not isinstance(term, Mapping):
        raise ValueError(f"recipe.mimic={term!r}: write dict(type='pca') or a list of such dicts")
    unknown = sorted(set(term) - set(_KEYS))
    if unknown:
        raise ValueError(f'recipe.mimic has no key {unknown[0]!r}; the keys are {sorted(_KEYS)}')
    kind, task_weight = term.get('type'), term.get('task_weight')
    if kind is None or (kind == 'paper' and is_detector):
        return None
    kind = 'pca' if kind == 'paper' else kind
    _check_type(kind, is_detector, term.get('layer'))
    names = ('loss_weight', *_OF_TYPE[kind])
    settings = {'type': kind, **{name: term.get(name, _KEYS[name]) for name in names}}
    if kind == 'pca':
        settings['layer'] = settings['layer'] or PENULTIMATE
    _check_values({**settings, 'task_weight': task_weight})
    return {**settings, 'task_weight': task_weight}


def _check_type(kind: Any, is_detector: bool, layer: str | None) -> None:
    if kind not in MIMIC_TYPES:
        allowed = ('auto', 'paper', *MIMIC_TYPES)
        raise ValueError(f'recipe.mimic.type={kind!r}: write one of {allowed}')
    needs_head = kind == 'logits' or (kind == 'pca' and layer in (None, PENULTIMATE))
    if is_detector and (needs_head or layer == PENULTIMATE):
        raise ValueError(
            f"recipe.mimic.type={kind!r} needs a classifier; write 'feature', or 'pca' with "
            'layer=NAME of a module'
        )


def _check_values(settings: Mapping[str, Any]) -> None:
    is_valid = {
        'loss_weight': lambda v: v >= 0,
        'task_weight': lambda v: v is None or v >= 0,
        'temperature': lambda v: v > 0,
        'explained_variance': lambda v: 0 < v <= 1,
        'num_images': lambda v: v is None or (isinstance(v, int) and v > 0),
    }
    wanted = {
        'temperature': 'a positive number',
        'explained_variance': 'a share in (0, 1]',
        'num_images': 'a positive integer, or None',
    }
    for name, value in settings.items():
        if name in is_valid and not is_valid[name](value):
            raise ValueError(
                f'recipe.mimic.{name}={value!r}: write {wanted.get(name, "a number from 0 on")}'
            )
