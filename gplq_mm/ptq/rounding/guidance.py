# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Token weights for GPTQ: influence of each output token of a layer on the model's features.

In the last blocks of a classifier only the class token, one of hundreds, reaches the head; a
Hessian with equal weights optimizes the rounding for the other tokens.

Source: GuidedQuant (arXiv 2505.07004), equation 6, with the features in place of the task loss:
the expected squared gradient of a random projection of the features is the diagonal of their
Gauss-Newton matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...stream import Unit
from ...stream.distributed import all_reduce_max, global_number
from ...stream.interception import intercepted
from ..task import PTQTask
from .feature_source import feature_source
from .soft_rounding import only_trainable, without_checkpointing

LOWEST = -16
"""Exponent of two at which token weights are clipped, relative to the largest one."""


class TokenWeights:
    """Weights of the output tokens of linear layers, powers of two.

    With powers of two, sums of products of codes stay exact in any order. Other layers, and
    layers that the features do not depend on, have no weights.

    Args:
        task: The task; its model has the stage-1 weights and runs once over the images, with
            gradients.
        units: All units, in execution order.
        exponent: Power of the token's squared gradient: 1 for the Gauss-Newton matrix, 0.5
            for estimates from few images.
    """

    def __init__(self, task: PTQTask, units: Sequence[Unit], exponent: float) -> None:
        linear = {n: la for n, la in task.layers.items() if la.takes_tokens}
        energies = _energies(task, units, linear)
        self._levels = {name: _levels(found, exponent) for name, found in energies.items()}

    def of_call(self, name: str, index: int, tokens: int) -> Tensor | None:
        """Exponents of two, ``(tokens,)``; None for a layer or call without weights.

        Args:
            name: Layer.
            index: Index of the call in the pass over this rank's images.
            tokens: Rows of the layer's input, flattened.
        """
        levels = self._levels.get(name)
        if levels is None or index >= len(levels) or len(levels[index]) != tokens:
            return None
        return levels[index]


def _levels(energies: Sequence[Tensor], exponent: float) -> list[Tensor] | None:
    """Exponents of two relative to the largest over the tokens of all ranks."""
    powers = [(exponent * e.log2()).round() for e in energies]
    own = max((float(p.max()) for p in powers if p.numel()), default=-float('inf'))
    largest = float(all_reduce_max(torch.tensor(own)))
    if largest == -float('inf'):
        return None
    return [(p - largest).clamp_min(LOWEST) for p in powers]


def _energies(
    task: PTQTask, units: Sequence[Unit], layers: dict[str, Any]
) -> dict[str, list[Tensor]]:
    """Squared gradient of a random projection of the features, per layer, call and token."""
    assert task.run_pass is not None
    source, _ = feature_source(task.model, units)
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    seen = 0

    def handle(run: Callable[[], Any]) -> None:
        nonlocal seen
        with torch.enable_grad(), _outputs(layers) as outputs:
            features = [f for f in source.features(run, seen) if f.requires_grad]
            generator = torch.Generator().manual_seed(task.seed + global_number(seen))
            seen += 1
            named = [(name, y) for name, calls in outputs.items() for y in calls]
            if not features or not named:
                return
            gradients = torch.autograd.grad(
                torch.stack([_projection(f, generator) for f in features]).sum(),
                [y for _, y in named],
                allow_unused=True,
            )
        for (name, y), gradient in zip(named, gradients, strict=True):
            grad = torch.zeros_like(y) if gradient is None else gradient
            found[name].append(grad.float().square().sum(-1).flatten().cpu())

    weights = [layer.weight for layer in layers.values()]
    with (
        only_trainable(task.model, weights),
        without_checkpointing(task.model),
        intercepted(task.model, handle),
    ):
        task.run_pass()
    return found


def _projection(feature: Tensor, generator: torch.Generator) -> Tensor:
    """Random projection of a feature, divided by the feature's norm."""
    signs = torch.randn(feature.shape, generator=generator).to(feature.device, feature.dtype)
    return (feature * signs).sum() / feature.detach().norm().clamp_min(1e-12)


@contextmanager
def _outputs(layers: dict[str, Any]) -> Iterator[dict[str, list[Tensor]]]:
    """Context manager: collects the outputs of each call of the layers."""
    calls: dict[str, list[Tensor]] = {name: [] for name in layers}

    def hook_of(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            calls[name].append(output)

        return hook

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
