# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Metrics of the difference between a model's outputs, or loss, and those of a reference."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

Outputs = Sequence[Tensor]
METRICS: dict[str, type['Metric']] = {}


class Metric(ABC):
    """Base class: error increase of outputs relative to a reference.

    ``terms`` of single batches are summed, also over ranks; ``increase`` computes the error
    increase from the sums: 0 without a difference, larger is worse, approximately additive
    over operands.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    """Unit of ``score``."""

    def __init_subclass__(cls) -> None:
        METRICS[cls.name] = cls

    @abstractmethod
    def terms(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """Terms of one batch, ``(K,)`` float64."""

    @abstractmethod
    def increase(self, sums: Tensor) -> float:
        """Error increase from the sums over all batches, ``(K,)``."""

    def errors(self, reference: Outputs, outputs: Outputs) -> Outputs:
        """Error of each output; empty if the error increase is not a square of errors.

        To second order the error increase is the sum of the squared errors, each weighted by its
        squared ``error_weights``; so the errors of several operands give their joint increase.
        """
        return ()

    def error_weights(self, sums: Tensor) -> Tensor:
        """Factor of each output's error, ``(outputs,)``."""
        return sums.new_zeros(0)

    def score(self, increase: float) -> float | None:
        """Error increase in ``unit``; None without an error increase."""
        return increase


class SQNR(Metric):
    """Noise power over signal power, mean over the output tensors.

    Its score is the signal to quantization noise ratio in dB.
    """

    name = 'sqnr'
    unit = 'output SQNR (dB)'

    def terms(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """Noise and signal power of each output tensor, interleaved."""
        pairs = zip(reference, outputs, strict=True)
        powers = [p for r, o in pairs for p in (_power(o.double() - r.double()), _power(r))]
        return torch.stack(powers)

    def increase(self, sums: Tensor) -> float:
        """Mean noise-to-signal ratio of the outputs that are not all zero; ``sums`` is ``(K,)``."""
        noise, signal = sums[::2], sums[1::2]
        known = signal > 0
        return float((noise[known] / signal[known]).mean()) if bool(known.any()) else 0.0

    def errors(self, reference: Outputs, outputs: Outputs) -> Outputs:
        """Plain differences."""
        return [o.double() - r.double() for r, o in zip(reference, outputs, strict=True)]

    def error_weights(self, sums: Tensor) -> Tensor:
        """Weights that make each output's error relative to its signal, ``(outputs,)``."""
        signal = sums[1::2]
        known = signal > 0
        return torch.where(known, (signal.clamp_min(1e-300) * known.sum()).rsqrt(), 0.0)

    def score(self, increase: float) -> float | None:
        """Decibels.

        Examples:
            >>> SQNR().score(0.01)
            20.0
        """
        return -10 * math.log10(increase) if increase > 0 else None


class KL(Metric):
    """Mean Kullback-Leibler divergence of the class probabilities from the reference's.

    Args:
        sigmoid: Each score is a separate probability (dense detectors) instead of a softmax
            over dimension 1.
    """

    name = 'kl'
    unit = 'KL of the outputs (nats)'

    def __init__(self, sigmoid: bool = False) -> None:
        self.sigmoid = sigmoid

    def terms(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """Summed divergence and number of distributions."""
        pairs = [(r.double(), o.double()) for r, o in zip(reference, outputs, strict=True)]
        divergence = self._bernoulli if self.sigmoid else self._categorical
        total = torch.stack([divergence(r, o) for r, o in pairs]).sum()
        sizes = [r.numel() // (1 if self.sigmoid else r.shape[1]) for r, _ in pairs]
        return torch.stack([total, total.new_tensor(sum(sizes))])

    def increase(self, sums: Tensor) -> float:
        """Mean divergence in nats, at least 0; ``sums`` is ``(K,)``."""
        return max(float(sums[0] / sums[1]), 0.0)

    def errors(self, reference: Outputs, outputs: Outputs) -> Outputs:
        """Differences of the scores in the metric of the Fisher information."""
        errors = []
        for r, o in zip(reference, outputs, strict=True):
            difference = o.double() - r.double()
            if self.sigmoid:
                p = r.double().sigmoid()
                errors.append((p * (1 - p)).sqrt() * difference)
            else:
                p = r.double().softmax(1)
                errors.append(p.sqrt() * (difference - (p * difference).sum(1, keepdim=True)))
        return errors

    def error_weights(self, sums: Tensor) -> Tensor:
        """Weights for half of the mean square, equal for all outputs: ``(outputs,)``."""
        return (2 * sums[1:]).rsqrt()

    @staticmethod
    def _categorical(reference: Tensor, outputs: Tensor) -> Tensor:
        p, q = F.log_softmax(reference, 1), F.log_softmax(outputs, 1)
        return (p.exp() * (p - q)).sum()

    @staticmethod
    def _bernoulli(reference: Tensor, outputs: Tensor) -> Tensor:
        total = reference.new_zeros(())
        for sign in (1, -1):
            p, q = F.logsigmoid(sign * reference), F.logsigmoid(sign * outputs)
            total = total + (p.exp() * (p - q)).sum()
        return total


class Loss(Metric):
    """Increase of the task loss; the outputs are the loss, a scalar per batch."""

    name = 'loss'
    unit = 'rise of the task loss'

    def terms(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """Summed difference and number of batches."""
        difference = outputs[0].double() - reference[0].double()
        return torch.stack([difference, torch.ones_like(difference)])

    def increase(self, sums: Tensor) -> float:
        """Mean increase; negative if the loss falls; ``sums`` is ``(K,)``."""
        return float(sums[0] / sums[1])


def build_metric(name: str, **options: Any) -> Metric:
    """Metric by its name.

    Raises:
        ValueError: If the name is unknown.

    Examples:
        >>> build_metric('sqnr').unit
        'output SQNR (dB)'
    """
    if name not in METRICS:
        raise ValueError(f'metric={name!r} is unknown; write one of {sorted(METRICS)}')
    return METRICS[name](**options)


def _power(x: Tensor) -> Tensor:
    return x.double().square().sum()
