# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Outputs in which student and teacher are compared: features, logits, named layers."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .mimic_settings import PENULTIMATE
from .score_head import SCORES, ScoreHead, score_head
from .teacher_precision import as_float, teacher_precision


@dataclass
class Recording:
    """One forward pass of a student or teacher.

    Attributes:
        model: The network.
        features: Result of ``extract_feat()``; None before it runs.
        outputs: Outputs of the watched modules by name.
    """

    model: Any
    features: Any = None
    outputs: dict[str, Any] = field(default_factory=dict)

    def levels(self, layer: str | None) -> list[Tensor]:
        """Feature maps of a layer, or of ``extract_feat()`` for None.

        Raises:
            ValueError: If the layer did not run or gives no tensor.
        """
        if layer == PENULTIMATE:
            return [penultimate(self.model, self.features)]
        found = self.features if layer is None else self._output(str(layer))
        levels = list(found) if isinstance(found, tuple | list) else [found]
        maps = [x for x in levels if isinstance(x, Tensor) and x.is_floating_point()]
        if not maps and layer is not None:
            raise ValueError(
                f'recipe.mimic.layer={layer!r} gives {type(found).__name__}, not a feature map; '
                'name a module that gives a tensor'
            )
        return maps or levels  # Swin's stages return their tokens and a size

    def samples(self, layer: str) -> Tensor:
        """Features of a layer with one row per sample, ``(N, C)``.

        Each token of ``(B, L, C)`` and each position of a map ``(B, C, H, W)`` is a sample.

        Raises:
            ValueError: If the layer gives anything else.
        """
        return as_rows(self.levels(layer)[-1], layer)

    def logits(self) -> dict[str, Tensor]:
        """Logits ``(N, classes)`` by task; a head with a single task has the name ``''``.

        Rows are images, or pixels of a segmentor.
        """
        if SCORES not in self.outputs:
            self.outputs[SCORES] = _head_of(self.model).logits(self.features)
        return _by_task(self.outputs[SCORES])

    def is_multi_label(self, task: str) -> bool:
        """Whether each logit of a task is a separate probability (sigmoid)."""
        return _head_of(self.model).is_multi_label(task)

    def _output(self, layer: str) -> Any:
        if layer not in self.outputs:
            raise ValueError(
                f'recipe.mimic.layer={layer!r} did not run in the forward pass of '
                f"{type(self.model).__name__}; name another module, or '{PENULTIMATE}'"
            )
        return self.outputs[layer]


@contextmanager
def watched(recording: Recording, layers: Sequence[str]) -> Iterator[None]:
    """Context manager: records the latest output of each named module.

    Calls of the score head with labels are not recorded: they do not return plain logits.
    """
    head = score_head(recording.model)
    with ExitStack() as stack:
        for name in layers:
            keep = partial(recording.outputs.__setitem__, name)
            if head is not None and name in (SCORES, head.name):
                stack.enter_context(head.watched(recording.model, keep))
            else:
                layer = recording.model.get_submodule(name)
                handle = layer.register_forward_hook(partial(_give_output, keep))
                stack.callback(handle.remove)
        yield


def _give_output(
    keep: Callable[[Any], None], module: nn.Module, args: tuple[Any, ...], output: Any
) -> None:
    keep(output)


@torch.no_grad()
def run_teacher(
    teacher: Any, inputs: Tensor, layers: Sequence[str], dtype: torch.dtype = torch.float32
) -> Recording:
    """Forward pass of the teacher; the head runs only if a watched module is in it.

    Args:
        teacher: Float model.
        inputs: Preprocessed batch, ``(B, 3, H, W)``.
        layers: Modules to watch.
        dtype: Type of its matrix products; recorded tensors are float32.
    """
    recording = Recording(teacher)
    with watched(recording, layers), teacher_precision(dtype, inputs.device):
        recording.features = teacher.extract_feat(inputs)
        head = score_head(teacher)
        if head is not None and any(n.split('.')[0] in (SCORES, head.name) for n in layers):
            recording.outputs[SCORES] = head.logits(recording.features)
    recording.features = as_float(recording.features)
    recording.outputs = as_float(recording.outputs)
    return recording


def penultimate(model: Any, features: Any) -> Tensor:
    """Input of a classifier's last layers, ``(N, C)``.

    It is the class token of a ViT (after the head's hidden layer if it has one), the pooled tokens
    of BEiT or Swin. If several last layers have different inputs (class and distillation token of
    a distilled head, the heads of several tasks), the features are concatenated.

    Raises:
        TypeError: If a head has no ``pre_logits``.
    """
    require_pre_logits(model)
    parts: list[Tensor] = []
    for part in _head_of(model).penultimate(features):
        if not any(part is known for known in parts):
            parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def has_penultimate(model: Any) -> bool:
    """Whether every head of a model has a penultimate feature (``pre_logits``)."""
    head = score_head(model)
    return head is not None and not head.lacking


def require_pre_logits(model: Any) -> None:
    """Refuse a model without a penultimate feature.

    Raises:
        TypeError: If it has no head, or a head without ``pre_logits``.
    """
    head = score_head(model)
    lacking = type(None).__name__ if head is None else head.lacking
    if lacking:
        raise TypeError(
            f'{lacking} has no pre_logits(), so it has no penultimate feature; '
            "write recipe=dict(mimic=dict(type='logits')), or mimic=dict(layer=NAME) with a "
            'module of the backbone'
        )


def require_layers(model: nn.Module, layers: Sequence[str]) -> None:
    """Refuse names of modules that the model does not have.

    Raises:
        ValueError: If a name is unknown; the message suggests similar ones.
    """
    names = [name for name, _ in model.named_modules() if name]
    for layer in layers:
        if layer in names:
            continue
        close = difflib.get_close_matches(layer, names, n=3, cutoff=0.4)
        hint = f'did you mean {" or ".join(map(repr, close))}?' if close else f'as {names[:3]}'
        raise ValueError(
            f'recipe.mimic.layer={layer!r} names no module of {type(model).__name__}; write '
            f"'{PENULTIMATE}' or a module's name, {hint}"
        )


def as_rows(feature: Any, layer: str) -> Tensor:
    """A feature with one row per sample.

    Args:
        feature: ``(N, C)``, tokens ``(B, L, C)`` or a map ``(B, C, H, W)``.
        layer: Name of its layer, for the message.

    Returns:
        ``(samples, C)``.

    Raises:
        ValueError: If it has none of these shapes.

    Examples:
        >>> [tuple(as_rows(torch.ones(s), 'x').shape) for s in ((4, 8), (4, 3, 8), (4, 8, 2, 2))]
        [(4, 8), (12, 8), (16, 8)]
    """
    if isinstance(feature, Tensor) and feature.dim() == 2:
        return feature
    if isinstance(feature, Tensor) and feature.dim() == 3:
        return feature.flatten(0, 1)
    if isinstance(feature, Tensor) and feature.dim() == 4:
        return feature.movedim(1, -1).flatten(0, 2)
    what = tuple(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
    raise ValueError(
        f'recipe.mimic.layer={layer!r} gives {what}; PCA needs features (N, C), tokens (B, L, C) '
        'or a map (B, C, H, W)'
    )


def _head_of(model: Any) -> ScoreHead:
    """Score head of a model that has one."""
    head = score_head(model)
    assert head is not None, f'{type(model).__name__} has no head'
    return head


def _by_task(logits: Any, prefix: str = '') -> dict[str, Tensor]:
    if isinstance(logits, Mapping):
        found: dict[str, Tensor] = {}
        for name, value in logits.items():
            found.update(_by_task(value, f'{prefix}.{name}' if prefix else str(name)))
        return found
    if isinstance(logits, tuple | list):
        # a distilled head returns one per token: class and distillation
        return {prefix: torch.stack([x.float() for x in logits]).mean(0)}
    return {prefix: logits}
