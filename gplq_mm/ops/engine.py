# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Engine: how a training step and inference are computed; all give the same numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import nn

from ..quantizers.packing import cpu_kernels

ENGINES = ('fused', 'reference')
FFN_MODES = ('layers', 'recompute')
INFERENCE = ('simulated', 'integer')
TEACHERS = ('auto', 'float32', 'bfloat16', 'float16')


@dataclass(frozen=True)
class Engine:
    """How a converted model computes; the result does not depend on it.

    Attributes:
        type: ``fused`` saves packed codes for the backward pass, ``reference`` the float
            tensors that autograd saves for the formulas as written.
        ffn: ``layers`` saves the input of the activation function between two quantized
            layers and the packed codes of its output; ``recompute`` saves neither, and the
            backward pass recomputes the first layer from its packed input.
        inference: ``simulated`` computes products of codes in floating point, ``integer`` in
            8-bit and 16-bit integers where a backend has a kernel for the operation and the
            processor; both are exact.
        teacher: Type of the teacher's matrix products; ``auto`` is bfloat16 on GPUs with
            hardware support, else float32.
        teacher_cache: Folder that keeps the teacher's outputs from epoch to epoch, for
            training pipelines without random transforms; None for no cache.

    Raises:
        ValueError: If a value is not one of these.
    """

    type: Literal['fused', 'reference'] = 'fused'
    ffn: Literal['layers', 'recompute'] = 'layers'
    inference: Literal['simulated', 'integer'] = 'simulated'
    teacher: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
    teacher_cache: str | None = None

    def __post_init__(self) -> None:
        choices = (
            ('type', ENGINES),
            ('ffn', FFN_MODES),
            ('inference', INFERENCE),
            ('teacher', TEACHERS),
        )
        for name, allowed in choices:
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f'engine.{name}={value!r}: write one of {allowed}')

    @property
    def description(self) -> str:
        """One line that says which path is active."""
        inference = '; inference on integers' if self.inference == 'integer' else ''
        if not self.is_fused:
            return f'engine reference: autograd saves float tensors{inference}'
        passes = f'saves packed codes; on a CPU {cpu_kernels.load()[1]}; ffn={self.ffn}'
        return f'engine fused: {passes}{inference}'

    @property
    def is_fused(self) -> bool:
        """Whether packed codes are saved."""
        return self.type == 'fused'


REFERENCE = Engine('reference', teacher='float32')


class EngineUser:
    """Mixin of modules whose computation depends on the engine."""

    engine: Engine = REFERENCE


def resolve_engine(engine: str | Mapping[str, Any] | Engine) -> Engine:
    """Engine from its name or its settings.

    Raises:
        ValueError: For an unknown name, key or value.

    Examples:
        >>> resolve_engine('fused').ffn, resolve_engine(dict(type='fused', ffn='recompute')).ffn
        ('layers', 'recompute')
    """
    if isinstance(engine, Engine):
        return engine
    if engine == 'reference':
        return REFERENCE
    if isinstance(engine, str):
        return Engine(engine)  # type: ignore[arg-type]
    known = [field.name for field in fields(Engine)]
    unknown = sorted(set(engine) - set(known))
    if unknown:
        raise ValueError(f'engine has no key {unknown[0]!r}; the keys are {known}')
    return Engine(**engine)


def set_engine(model: nn.Module, engine: str | Mapping[str, Any] | Engine) -> Engine:
    """Choose the engine of every quantized operator of a converted model.

    Args:
        model: Converted model.
        engine: ``'fused'``, ``'reference'``, or a dict with ``type`` and options.

    Returns:
        The engine chosen.

    Raises:
        ValueError: For an unknown name, key or value.
    """
    chosen = resolve_engine(engine)
    for module in model.modules():
        if isinstance(module, EngineUser):
            module.engine = chosen
    return chosen
