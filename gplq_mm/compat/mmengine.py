# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Undocumented parts of MMEngine that the package uses.

No other file uses a private name of MMEngine; ``tests/test_compat/test_mmengine.py`` has a test
for each function here, which fails if MMEngine changes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from mmengine.config import Config, ConfigDict

if TYPE_CHECKING:  # a tool reads its config before it imports the runner, which takes seconds
    from mmengine.optim import OptimWrapper
    from mmengine.runner import EpochBasedTrainLoop, Runner
    from mmengine.runner.base_loop import BaseLoop


def train_loop(runner: Runner) -> BaseLoop | None:
    """The training loop of a runner, None before it is built.

    ``runner.train_loop`` would build the loop, and with it the training data set, which is not
    needed for a test.
    """
    return built_loops(runner).get('train')


def built_loops(runner: Runner) -> dict[str, BaseLoop]:
    """Loops of a runner that are built already: ``train``, ``val`` and ``test``."""
    from mmengine.runner.base_loop import BaseLoop

    loops = {name: getattr(runner, f'_{name}_loop', None) for name in ('train', 'val', 'test')}
    return {name: loop for name, loop in loops.items() if isinstance(loop, BaseLoop)}


def is_resumed(runner: Runner) -> bool:
    """Whether a run resumes from a training checkpoint, with its optimizer and epoch."""
    return runner._resume


def load_path(runner: Runner) -> str | None:
    """Checkpoint that a run starts from; None if the config has none."""
    return runner._load_from


def start_from(runner: Runner, checkpoint: str, resume: bool) -> None:
    """Set the checkpoint that a run starts from, before the runner loads it.

    Args:
        runner: Runner in ``before_run``.
        checkpoint: File or URL.
        resume: Whether optimizer, schedulers and epoch are loaded too.
    """
    runner._load_from, runner._resume = checkpoint, resume


def accumulated_batches(wrapper: OptimWrapper) -> int:
    """Number of batches whose gradients are accumulated for one optimizer step."""
    return wrapper._accumulative_counts


def count_epoch(loop: EpochBasedTrainLoop) -> None:
    """Increase a loop's epoch counter, as its own ``run_epoch`` does."""
    loop._epoch += 1


def is_lazy_config(path: str) -> bool:
    """Whether a config file has MMEngine's import style (``with read_base():``)."""
    return Config._is_lazy_import(path)


def brief_runner() -> type[Runner]:
    """MMEngine's runner, whose console leaves out what its log file has in full.

    These are environment, config and list of hooks: hundreds of lines before the first of a run.
    """
    from mmengine.runner import Runner

    class BriefRunner(Runner):
        """The runner with a filter on its console."""

        def _log_env(self, env_cfg: dict) -> None:
            handlers = self.logger.handlers
            if any(isinstance(handler, logging.FileHandler) for handler in handlers):
                for handler in handlers:
                    if not isinstance(handler, logging.FileHandler):
                        handler.addFilter(_is_brief)
            super()._log_env(env_cfg)

    return BriefRunner


def _is_brief(record: logging.LogRecord) -> bool:
    return not record.getMessage().lstrip('\n-').startswith(_LONG)


_LONG = ('System environment:', 'Config:\n', 'Hooks will be executed in the following order:')


@contextmanager
def merging_over_names(kinds: tuple[str, ...], key: str, name_key: str) -> Iterator[None]:
    """Context manager: a dict of a child config merges over a name that its base config has.

    MMEngine refuses ``model = dict(recipe=dict(scope='all'))`` over ``recipe='w4a4'``; here the
    name is read as ``dict(base='w4a4')``. Other strings are refused as always.

    Args:
        kinds: Types of the dicts that hold the key.
        key: The key, such as ``recipe``.
        name_key: Key of the dict that stands for the name alone, such as ``base``.
    """
    merge = Config._merge_a_into_b

    def merge_over_names(a: Any, b: Any, allow_list_keys: bool = False) -> Any:
        own, base = (side if isinstance(side, Mapping) else {} for side in (a, b))
        is_name = isinstance(own.get(key), Mapping) and isinstance(base.get(key), str)
        if is_name and own.get('type', base.get('type')) in kinds:
            b = b.copy()
            b[key] = ConfigDict({name_key: base[key]})
        return merge(a, b, allow_list_keys)

    Config._merge_a_into_b = staticmethod(merge_over_names)
    try:
        yield
    finally:
        Config._merge_a_into_b = staticmethod(merge)


def history_statistics() -> Mapping[str, Callable]:
    """Functions that a pickled ``HistoryBuffer`` refers to, by name."""
    from mmengine.logging import HistoryBuffer

    return HistoryBuffer()._statistics_methods


def load_files_with_suffix(suffix: str, loader: Callable[..., dict[str, Any]]) -> None:
    """Have MMEngine load local checkpoint files of a suffix with a function.

    It is called ``loader(path, map_location)`` wherever MMEngine takes a checkpoint. MMEngine
    registers loaders by prefix, but matches prefixes as regular expressions.

    Args:
        suffix: Such as ``.safetensors``.
        loader: A function named ``load_from_...``: MMEngine logs the part after ``load_from_``.
    """
    from mmengine.runner.checkpoint import CheckpointLoader

    CheckpointLoader.register_scheme(rf'.*{re.escape(suffix)}$', loader, force=True)


def is_empty_data_set(frame: FrameType) -> bool:
    """Whether a function in which an error was raised is a data set that has no images.

    MMEngine's data set serializes its list of images, and NumPy refuses an empty one. The list
    alone tells nothing: it is empty before it is read, and again after it is serialized.
    """
    from mmengine.dataset import BaseDataset

    dataset = frame.f_locals.get('self')
    if not isinstance(dataset, BaseDataset) or frame.f_code.co_name != '_serialize_data':
        return False
    return not dataset.data_list
