# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Collects what a run measures and keeps ``gplq_report.json`` up to date."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmengine
import torch
from mmengine.dist import is_main_process
from mmengine.logging import print_log

from .... import __version__
from ....analysis import (
    REPORT_NAME,
    MacCount,
    bit_operations,
    count_macs,
    format_start,
    model_bytes,
    read_json,
    report_table,
    scope_line,
    write_json,
)
from ....analysis.cost import FLOAT_BITS


class RunReport:
    """The report of one work dir; a resumed run continues it.

    Args:
        work_dir: Folder of ``gplq_report.json``.
        resume: Keep the entries of an earlier process of this run.
    """

    def __init__(self, work_dir: str, resume: bool) -> None:
        self.path = Path(work_dir) / REPORT_NAME
        self.data: dict[str, Any] = read_json(self.path) if resume else {}
        self.macs: MacCount | None = None

    def describe(
        self,
        recipe: Mapping[str, Any],
        coverage: Mapping[str, Any],
        seed: int,
        engine: str = '',
        validation: str = '',
    ) -> None:
        """Record recipe, coverage, versions, seed, and the engine of stage 1.

        Args:
            recipe: Resolved recipe.
            coverage: Coverage of the conversion.
            seed: Seed of the run.
            engine: Description of the engine of stage 1.
            validation: From ``validation_key``; scores of an earlier process on other images are
                dropped.
        """
        if self.data.get('validation', validation) != validation:
            for stage in ('fp32', 'stage1', 'stage2'):
                self.data.get(stage, {})['metrics'] = {}
        self.data.update(
            validation=validation,
            engine=engine,
            recipe=dict(recipe),
            coverage=dict(coverage),
            versions=versions(),
            seed=seed,
        )
        self.write()

    def keep_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Replace the recipe: the gate added bits to it."""
        self.data['recipe'] = dict(recipe)
        self.write()

    def stage1_iterations(self) -> int | None:
        """Iterations after which stage 1 was scored; None if it was not."""
        return self.data.get('stage1', {}).get('iterations')

    def update(self, stage: str, **values: Any) -> None:
        """Set values of one stage (``fp32``, ``stage1``, ``stage2``)."""
        self.data.setdefault(stage, {'metrics': {}}).update(values)
        self.write()

    def count_macs(self, model: Any, batch: Any) -> None:
        """Count the operations of one forward pass, from which all stages' BOPs are computed."""
        was_training = model.training
        model.eval()
        self.macs = count_macs(model, lambda: model.test_step(batch))
        model.train(was_training)
        self.update('fp32', bops=self.macs.total * FLOAT_BITS**2)
        self.update_cost('stage1', model)

    def update_cost(self, stage: str, model: Any, side_macs: int = 0) -> None:
        """Set a stage's BOPs (float side branches included) and its model bytes."""
        assert self.macs is not None
        bops = bit_operations(model, self.macs) + side_macs * FLOAT_BITS**2
        self.update(stage, bops=bops, model_bytes=model_bytes(model))

    def write(self) -> None:
        """Write the file (main process only)."""
        if is_main_process():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.data)

    def log_table(self) -> None:
        """Log the closing table."""
        gate = self.data.get('calibration', {}).get('gate')
        lines = [scope_line(self.data), self.data.get('engine', '')]
        lines += [f'calibrated: {format_start(gate)}'] if gate else []
        text = '\n'.join([*lines, report_table(self.data)])
        print_log(f'GPLQ report ({self.path}):\n{text}', logger='current')


def versions() -> dict[str, str]:
    """Versions of the libraries that results depend on."""
    found = {
        'gplq_mm': __version__,
        'python': platform.python_version(),
        'torch': torch.__version__,
        'mmengine': mmengine.__version__,
    }
    for name in ('mmcv', 'mmdet', 'mmpretrain', 'mmseg'):
        try:
            found[name] = __import__(name).__version__
        except (ImportError, AssertionError):
            continue
    return found
