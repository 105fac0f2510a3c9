# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Loss terms of stage 1 from the recipe's ``mimic``."""

from dataclasses import replace
from typing import Any

from ..recipe import MimicTerm, mimic_terms
from ..recipe.sections.mimic import own_keys

PENULTIMATE = 'penultimate'


def resolve_mimic(
    mimic: Any,
    is_detector: bool,
    has_penultimate: bool = True,
    has_logits: bool | None = None,
) -> dict[str, Any] | None:
    """Mimicking settings with ``auto`` and ``paper`` replaced by types.

    Args:
        mimic: A term, several, or None, typed or plain. Keys of a term:

            - ``type``: ``feature``, ``pca`` or ``logits``; ``auto`` means features for
              detectors, features and the logits of every pixel for segmentors, and for
              classifiers logits and the penultimate feature; ``paper`` nothing for detectors
              and segmentors and PCA for classifiers.
            - ``loss_weight``: Factor of the term (the paper's alpha).
            - ``task_weight``: Factor of the model's own losses; one value for all terms.
            - ``layer``: What ``feature`` and ``pca`` compare: ``penultimate`` (PCA's
              default), a module's name, or None for ``extract_feat()`` (of ``feature``).
            - ``temperature``: Temperature of ``logits``.
            - ``explained_variance``: Share of the variance that the PCA basis keeps.
            - ``num_images``: Training images for that basis; None for 1024, or all
              if there are fewer.
        is_detector: Whether the model is a detector.
        has_penultimate: Whether the model has a penultimate feature; ``auto`` leaves that
            term out if it has none.
        has_logits: Whether the model has logits that can be compared; None: if it is no
            detector.

    Returns:
        ``task_weight`` and ``terms``, or None if stage 1 uses the task loss only.

    Raises:
        ValueError: For an unknown type or key, a value out of range, or a type that the
            model cannot use.
    """
    given = mimic_terms(mimic)
    has_logits = not is_detector if has_logits is None else has_logits
    concrete = [
        t for term in given for t in _expanded(term, is_detector, has_penultimate, has_logits)
    ]
    found = [_term(term, is_detector, has_logits) for term in concrete]
    terms = [term for term in found if term is not None]
    if not terms:
        return None
    kinds = [(term['type'], term.get('layer')) for term in terms]
    if len(set(kinds)) < len(kinds):
        raise ValueError(
            f'recipe.mimic={mimic!r}: two terms compare the same values; give one of them'
        )
    weights = {term.pop('task_weight') for term in terms} - {None}
    if len(weights) > 1:
        raise ValueError(f'recipe.mimic: task_weight is {sorted(weights)}; give one value')
    return {'task_weight': weights.pop() if weights else 1.0, 'terms': terms}


def _expanded(
    term: MimicTerm, is_detector: bool, has_penultimate: bool, has_logits: bool
) -> list[MimicTerm]:
    """The terms that replace ``auto`` and ``paper``."""
    if term.type != 'auto':
        return [term]
    logits = replace(term, type='logits', layer=None)
    if is_detector:
        feature = replace(term, type='feature')
        return [logits, replace(feature, task_weight=None)] if has_logits else [feature]
    if not has_penultimate:
        return [logits]
    layer = term.layer or PENULTIMATE
    return [logits, replace(term, type='feature', layer=layer, task_weight=None)]


def _term(term: MimicTerm, is_detector: bool, has_logits: bool) -> dict[str, Any] | None:
    if term.type is None or (term.type == 'paper' and is_detector):
        return None
    kind = 'pca' if term.type == 'paper' else term.type
    _check_type(kind, is_detector, has_logits, term.layer)
    settings = {name: getattr(term, name) for name in ('loss_weight', *own_keys(kind))}
    if kind == 'pca':
        settings['layer'] = settings['layer'] or PENULTIMATE
    return {'type': kind, **settings, 'task_weight': term.task_weight}


def _check_type(kind: str, is_detector: bool, has_logits: bool, layer: str | None) -> None:
    needs_pooled = layer == PENULTIMATE or (kind == 'pca' and layer is None)
    if is_detector and (needs_pooled or (kind == 'logits' and not has_logits)):
        raise ValueError(
            f"recipe.mimic.type={kind!r} needs a classifier; write 'feature', or 'pca' with "
            'layer=NAME of a module'
        )
