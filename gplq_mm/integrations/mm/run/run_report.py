# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Collects what a run measures and keeps ``gplq_report.json`` up to date."""

import logging
import platform
import shlex
import sys
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
from ....analysis.cost import FLOAT_BITS, mean_code_bits
from ....analysis.operands import count_elements, find_operands
from ....pages.live_page import LivePage

UNFINISHED = 'unfinished_seconds'
"""Key of a report whose run is in the middle of a stage."""


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
        self.elements: dict[str, int] = {}
        self.page = LivePage()

    def describe(
        self,
        recipe: Mapping[str, Any],
        coverage: Mapping[str, Any],
        seed: int,
        engine: str = '',
        validation: str = '',
        logs: str = '',
    ) -> None:
        """Record recipe, coverage, versions, seed, command, and the engine of stage 1.

        Args:
            recipe: Resolved recipe.
            coverage: Coverage of the conversion.
            seed: Seed of the run.
            engine: Description of the engine of stage 1.
            validation: From ``validation_key``; scores of an earlier process on other images are
                dropped.
            logs: Folder of this process's logs, in the work dir.
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
            command=shlex.join(['python', *sys.argv]),
            logs=[name for name in (*self.data.get('logs', ()), logs) if name],
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

    def keep_unfinished(self, stage: str, seconds: float) -> None:
        """Note the seconds of a stage that has not ended, for the process that resumes it."""
        self.data.setdefault(UNFINISHED, {})[stage] = seconds
        self.write()

    def take_unfinished(self, stage: str) -> float:
        """Seconds that killed processes spent on parts of a stage; removes the note."""
        noted = self.data.pop(UNFINISHED, {})
        return noted.get(stage, 0.0)

    def count_macs(self, model: Any, batch: Any) -> None:
        """Count the operations of one forward pass, from which all stages' BOPs are computed."""
        was_training = model.training
        model.eval()

        def run() -> None:
            self.macs = count_macs(model, lambda: model.test_step(batch))

        operands = find_operands(model)
        self.elements = count_elements(model, operands, run)
        assert self.macs is not None
        self.data['operands'] = [
            {'name': o.name, 'kind': o.kind, 'module': o.module, 'role': o.role, 'bits': o.num_bits}
            for o in operands.values()
        ]
        model.train(was_training)
        self.update('fp32', bops=self.macs.total * FLOAT_BITS**2)
        self.update_cost('stage1', model)

    def update_cost(self, stage: str, model: Any, side_macs: int = 0) -> None:
        """Set a stage's BOPs (float side branches included) and its model bytes."""
        assert self.macs is not None
        bops = bit_operations(model, self.macs) + side_macs * FLOAT_BITS**2
        bits = mean_code_bits(model, self.elements)
        self.update(stage, bops=bops, model_bytes=model_bytes(model), mean_bits=bits)

    def write(self) -> None:
        """Write the file, and refresh the page now and then (main process only)."""
        if is_main_process():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.data)
            self.refresh_page()

    def refresh_page(self, finished: bool = False) -> None:
        """Write ``gplq_report.html``, unless it was written a moment ago.

        Args:
            finished: The run has ended: write it in any case.
        """
        if not is_main_process() or 'recipe' not in self.data:
            return
        problem = self.page.refresh(self.path, finished)
        if problem:
            print_log(problem, logger='current', level=logging.WARNING)

    def log_table(self) -> None:
        """Log the closing table and write the finished page."""
        gate = self.data.get('calibration', {}).get('gate')
        lines = [scope_line(self.data), self.data.get('engine', '')]
        lines += [f'calibrated: {format_start(gate)}'] if gate else []
        text = '\n'.join([*lines, report_table(self.data)])
        print_log(f'GPLQ report ({self.path}):\n{text}', logger='current')
        self.refresh_page(finished=True)


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
