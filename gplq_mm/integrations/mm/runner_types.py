# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What the package uses of MMEngine's runner and loops, as types: MMEngine's own are skipped."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn
from torch.utils.data import DataLoader


class DataLoop(Protocol):
    """A loop of ``mmengine.runner``.

    Attributes:
        dataloader: Its batches.
        evaluator: Computes the metrics; of validation and test loops only.
        fp16: Whether the forward passes run under autocast; likewise.
    """

    dataloader: DataLoader
    evaluator: Any
    fp16: bool


class TrainingRunner(Protocol):
    """``mmengine.runner.Runner`` with a training loop.

    Attributes:
        model: Model, possibly in a DDP-like wrapper.
        cfg: The run's config, ``mmengine.Config``.
        param_schedulers: Schedulers of the optimizer; None without a training.
        optim_wrapper: Optimizer in MMEngine's wrapper; None without a training.
    """

    model: nn.Module
    cfg: Any
    param_schedulers: Any
    optim_wrapper: Any

    @property
    def work_dir(self) -> str:
        """Folder of checkpoints and logs."""

    @property
    def experiment_name(self) -> str:
        """Name of the run."""

    @property
    def timestamp(self) -> str:
        """Start of this process, the name of its folder of logs in the work dir."""

    @property
    def seed(self) -> int:
        """Seed of the run."""

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""

    @property
    def iter(self) -> int:
        """Number of finished iterations."""

    @property
    def max_iters(self) -> int:
        """Iterations of the whole training."""

    @property
    def hooks(self) -> Sequence[Any]:
        """Registered hooks."""

    @property
    def train_loop(self) -> DataLoop:
        """Training loop, built at the first access."""

    @property
    def val_loop(self) -> DataLoop | None:
        """Validation loop; None without validation."""

    @property
    def train_dataloader(self) -> DataLoader:
        """Training batches."""

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call a method of all hooks."""

    def save_checkpoint(
        self, out_dir: str, filename: str, *, meta: Mapping[str, Any] | None = None
    ) -> None:
        """Write the full state of the training."""
