# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Everything that the package uses of MMEngine and that MMEngine does not document.

No other file touches an underscored name of MMEngine's; ``tests/test_compat/test_mmengine.py``
has a test for each function here, which fails by name where MMEngine changes.
"""

from collections.abc import Callable, Mapping

from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.runner.base_loop import BaseLoop


def train_loop(runner: Runner) -> BaseLoop | None:
    """The training loop of a runner, None before it is built.

    ``runner.train_loop`` builds the loop, and with it the training data set, which a test needs
    not to have.
    """
    loop = getattr(runner, '_train_loop', None)
    return loop if isinstance(loop, BaseLoop) else None


def is_resumed(runner: Runner) -> bool:
    """Whether a run goes on from a training checkpoint, its optimizer and epoch included."""
    return runner._resume


def load_path(runner: Runner) -> str | None:
    """Checkpoint that a run starts from; None where the config names none."""
    return runner._load_from


def start_from(runner: Runner, checkpoint: str, resume: bool) -> None:
    """Name the checkpoint that a run starts from, before the runner loads it.

    Args:
        runner: Runner in ``before_run``.
        checkpoint: File or URL.
        resume: Whether optimizer, schedulers and epoch are loaded too.
    """
    runner._load_from, runner._resume = checkpoint, resume


def accumulated_batches(wrapper: OptimWrapper) -> int:
    """Batches whose gradients are summed to one step of the optimizer."""
    return wrapper._accumulative_counts


def count_epoch(loop: EpochBasedTrainLoop) -> None:
    """Tell a loop that one more epoch is done, as its own ``run_epoch`` does."""
    loop._epoch += 1


def is_lazy_config(path: str) -> bool:
    """Whether a config file is of MMEngine's import style (``with read_base():``)."""
    return Config._is_lazy_import(path)


def history_statistics() -> Mapping[str, Callable]:
    """The functions that a pickled ``HistoryBuffer`` names, by name."""
    return HistoryBuffer()._statistics_methods
