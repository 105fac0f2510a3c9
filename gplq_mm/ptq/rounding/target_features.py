# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Target features of the quantized model: those of the stage-1 or of the float model."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...stream import Call, CallStore, intercepted
from ...stream.distributed import all_reduce_sum
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
