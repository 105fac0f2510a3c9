# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Target features of the quantized model, and training on them.

They are the features of the stage-1 or of the float model.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...stream import Call, CallStore, intercepted
from ...stream.distributed import all_reduce_sum, global_number
from ...stream.exact_sum import FixedPointSum
from ...stream.passes import RunPass
from ..task import PTQTask
from .feature_source import FeatureSource


class TargetFeatures:
    """Features of another state of the model on all images, stored in one pass.

    Args:
        task: The task.
        source: The features to store.
        budget_bytes: Bytes of features kept in memory; the rest is on disk.
        run_pass: Runs the model over this rank's images; ``task.run_pass`` if None.
        state: Context manager of the target state; ``task.stage1`` if None.

    Attributes:
        batches: Calibration batches over all ranks.
    """

    def __init__(
        self,
        task: PTQTask,
        source: FeatureSource,
        budget_bytes: int,
        run_pass: RunPass | None = None,
        state: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.task, self.source = task, source
        self.run_pass = run_pass or task.run_pass
        self.targets = CallStore(budget_bytes, task.folder)
        with (state or task.stage1)():
            self.each(self.keep)
        total = torch.tensor(float(len(self.targets)))
        all_reduce_sum(total)
        self.batches = int(total)

    def each(self, handle: Callable[[partial[Any]], Any]) -> None:
        """Call ``handle`` with the forward of each of this rank's batches."""
        assert self.run_pass is not None
        with intercepted(self.task.model, handle):
            self.run_pass()

    def keep(self, run: partial[Any]) -> None:
        """Store the features of one batch; the model is in the target state."""
        self.targets.append(Call(tuple(self.source.features(run, len(self.targets)))))

    def loss(self, run: Callable[[], Any], index: int) -> Tensor:
        """Mean squared error of a batch's features, each divided by its power.

        Args:
            run: The model's forward with the batch.
            index: Index of the batch on this rank.
        """
        parts = []
        for y, stored in zip(
            self.source.features(run, index), self.targets[index].args, strict=True
        ):
            target = stored.to(y.device)
            power = target.square().mean().clamp_min(1e-12)
            parts.append((y - target).square().mean() / power)
        return torch.stack(parts).mean()


class TrainedFeatures(TargetFeatures):
    """Passes that train the model on its target features, with equal bits on any number of ranks.

    Args:
        *args: Those of ``TargetFeatures``.
        held_out: One batch of this many, at the end, is not trained on; 0 to train on all.
        **kwargs: Those of ``TargetFeatures``.

    Attributes:
        trained: Batches to train on, over all ranks.
    """

    def __init__(self, *args: Any, held_out: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trained = self.batches
        if held_out:
            self.trained -= max(1, self.batches // held_out)

    def error(self, first: int = 0) -> float:
        """Mean loss of the batches from number ``first`` on, the same on all ranks."""
        losses: list[float] = []
        seen = 0

        def measure(run: partial[Any]) -> None:
            nonlocal seen
            if global_number(seen) >= first:
                losses.append(float(self.loss(run, seen)))
            seen += 1

        self.each(measure)
        return _exact_mean(losses, self.batches - first)

    def train(
        self,
        parameters: Sequence[Tensor],
        batches: int,
        step: Callable[[], None],
        more: Callable[[], bool] = lambda: True,
    ) -> float:
        """One pass: train on the first batches, then measure the held-out ones.

        Args:
            parameters: Trained parameters of any shape; they get the same gradients on all ranks.
            batches: Batches per step, over all ranks.
            step: Called on every rank, with gradients.
            more: Returns whether another step is required.

        Returns:
            Mean error of the held-out batches; 0 without any.
        """
        sums = [FixedPointSum(tuple(p.shape), p.device) for p in parameters]
        steps, held_out = -(-self.trained // batches), list[float]()
        seen, stepped = 0, 0

        def flush(until: int) -> None:
            nonlocal stepped
            while stepped < until:
                count = min(batches, self.trained - stepped * batches)
                stepped += 1
                if not more():
                    continue
                for parameter, total in zip(parameters, sums, strict=True):
                    total.reduce()
                    parameter.grad = (total.value() / count).to(parameter.dtype)
                    total.clear()
                step()

        def handle(run: partial[Any]) -> None:
            nonlocal seen
            number, index = global_number(seen), seen
            seen += 1
            if number >= self.trained:
                flush(steps)
                held_out.append(float(self.loss(run, index)))
                return
            flush(number // batches)
            if not more():
                return
            with torch.enable_grad():
                loss = self.loss(run, index)
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            for total, grad in zip(sums, grads, strict=True):
                if grad is not None:
                    total.add(grad)

        self.each(handle)
        flush(steps)
        return _exact_mean(held_out, self.batches - self.trained)


def _exact_mean(losses: Sequence[float], count: int) -> float:
    """Mean of the ``count`` losses of all ranks, of which these are the own ones."""
    total = FixedPointSum((), torch.device('cpu'))
    for loss in losses:
        total.add(torch.tensor(loss, dtype=torch.float64))
    total.reduce()
    return float(total.value()) / max(count, 1)
