# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Terms of stage 1's loss that compare the model with the float model."""

from dataclasses import dataclass
from typing import Any, Literal

from ..check import Limits, parse_value
from .section import Section, plain, setting

_COMMON = {'type', 'loss_weight', 'task_weight'}
_PCA = {'layer', 'explained_variance', 'num_images'}
OF_TYPE: dict[str | None, set[str]] = {
    'auto': _COMMON | {'layer', 'temperature'},
    'paper': _COMMON | _PCA,
    'feature': _COMMON | {'layer'},
    'pca': _COMMON | _PCA,
    'logits': _COMMON | {'temperature'},
    None: _COMMON,
}
"""Keys that have an effect, by type of the term."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MimicTerm(Section):
    """One term of stage 1's loss, which compares student and teacher."""

    type: Literal['auto', 'paper', 'feature', 'pca', 'logits'] | None = setting(
        'values compared; auto and paper depend on the task; null for none'
    )
    loss_weight: float = setting("factor of the term (the paper's alpha)", 1.0, minimum=0)
    task_weight: float | None = setting("factor of the model's own losses", None, minimum=0)
    layer: str | None = setting('layer compared by feature and pca: penultimate or a name', None)
    temperature: float = setting('of logits', 1.0, above=0)
    explained_variance: float = setting(
        'share of the variance that the PCA basis keeps', 0.6, above=0, maximum=1
    )
    num_images: int | None = setting(
        'training images for the PCA basis; null for 1024, or all', None, minimum=1
    )

    def check(self, path: str) -> None:
        """Refuse keys that a term of this type does not use.

        Raises:
            ValueError: Names the key and those of the type.
        """
        idle = [key for key in self.given or () if key not in OF_TYPE[self.type]]
        if idle:
            raise ValueError(
                f'{path}.{idle[0]}={getattr(self, idle[0])!r} has no effect with '
                f'type={self.type!r}; its keys are {sorted(OF_TYPE[self.type])}'
            )


def own_keys(kind: str) -> list[str]:
    """Keys that only this type of term has, in the order of ``MimicTerm``.

    Examples:
        >>> own_keys('pca')
        ['layer', 'explained_variance', 'num_images']
    """
    keys = MimicTerm.keys()
    return [key for key in keys if key in OF_TYPE[kind] - _COMMON]


Mimic = MimicTerm | tuple[MimicTerm, ...] | None


def mimic_terms(mimic: Any) -> list[MimicTerm]:
    """The terms of a recipe's ``mimic``.

    Args:
        mimic: One term, several, or None; typed or plain.

    Raises:
        ValueError: For an unknown type or key, and a value out of range.

    Examples:
        >>> [term.type for term in mimic_terms([dict(type='pca'), dict(type='logits')])]
        ['pca', 'logits']
    """
    parsed = parse_value(plain(mimic), Mimic, Limits('terms of the loss'), 'recipe.mimic')
    return [parsed] if isinstance(parsed, MimicTerm) else list(parsed or ())
