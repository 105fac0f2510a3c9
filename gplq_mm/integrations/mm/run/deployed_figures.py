# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The end of a run: its packed file, and the latency of the model that is deployed."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from torch import nn

from ....analysis.start_error import as_float_model
from ....api.deploying import deploy
from ....deployment.packed_file import packed_checkpoint
from ....ops import set_engine
from ..checkpoints.checkpoint_io import write_checkpoint
from ..checkpoints.run_checkpoint import FINAL_NAME
from ..data.calibration_data import CalibrationSet
from .run_report import RunReport
from .teacher import read_float

FORMATS = ('pth', 'safetensors')
BLOCKS, BLOCK_SECONDS, MOST_CALLS = 3, 1.0, 20
"""Float and integer blocks alternate; a block ends after so many seconds or calls."""


def check_format(form: str | None) -> None:
    """Refuse a packed format that does not exist.

    Raises:
        ValueError: For anything but one of ``FORMATS`` and None.
    """
    if form is not None and form not in FORMATS:
        raise ValueError(
            f'GPLQHook(deploy={form!r}): write one of {FORMATS}, or None for no packed file; '
            'tools/deploy.py writes ONNX and OpenVINO'
        )


def packed_path(final: str | Path, form: str) -> Path:
    """The packed file beside a final checkpoint.

    Examples:
        >>> packed_path('x/gplq_final.pth', 'pth').name
        'gplq_packed.pth'
        >>> packed_path('x/gplq_final_mse.pth', 'safetensors').name
        'gplq_final_mse_packed.safetensors'
    """
    path = Path(final)
    stem = 'gplq_packed' if path.name == FINAL_NAME else f'{path.stem}_packed'
    return path.with_name(f'{stem}.{form}')


def report_deployed(
    model: Any,
    checkpoint: Mapping[str, Any],
    final: str | Path,
    form: str | None,
    calibration: CalibrationSet,
    report: RunReport,
) -> None:
    """Write the packed file of a finished model, and measure its latency on the CPU.

    Args:
        model: Model after stage 2, not wrapped; unchanged afterwards.
        checkpoint: Content of its final checkpoint.
        final: Path of that checkpoint.
        form: ``GPLQHook(deploy=...)``; None does nothing.
        calibration: Images; the first one is timed.
        report: Gets ``disk_bytes`` and ``latency_ms``.
    """
    if form is None:
        return
    if is_main_process():
        path = packed_path(final, form)
        write_checkpoint(packed_checkpoint(model, checkpoint), path)
        report.update('stage2', packed_file=path.name, disk_bytes=path.stat().st_size)
        source = checkpoint['gplq']['float_checkpoint']
        with _on_cpu(model):
            image = calibration.collate([calibration.dataset[calibration.indices[0]]])
            _report_latency(model, image, source, report)
    barrier()


def _report_latency(model: Any, image: Any, source: Mapping[str, Any], report: RunReport) -> None:
    """Latency of FP32 and of the integer engine, in blocks that alternate."""
    float_state = _float_state(source)
    seconds: dict[str, list[float]] = {'fp32': [], 'stage2': []}
    for _ in range(BLOCKS):
        if float_state is not None:
            with as_float_model(model, float_state):
                seconds['fp32'] += time_calls(lambda: model.test_step(image))
        seconds['stage2'] += time_calls(lambda: model.test_step(image))
    found = {stage: 1e3 * median(values) for stage, values in seconds.items() if values}
    for stage, latency in found.items():
        report.update(stage, latency_ms=latency)
    about = f'one image, one CPU, {torch.get_num_threads()} thread(s)'
    report.update('stage2', latency_about=about)
    if 'fp32' in found:
        ratio = found['fp32'] / found['stage2']
        report.update('stage2', latency_ratio=ratio)
        print_log(
            f'latency, {about}: FP32 {found["fp32"]:.1f} ms, integer {found["stage2"]:.1f} ms, '
            f'{ratio:.2f} x',
            logger='current',
        )


def _float_state(source: Mapping[str, Any]) -> dict[str, Any] | None:
    """FP32 weights that the run began with; None if their file is gone or another one."""
    if not Path(str(source.get('path', ''))).is_file():
        return None
    try:
        return read_float(source)
    except ValueError as error:
        print_log(f'latency of FP32 is left out: {error}', logger='current')
        return None


@torch.no_grad()
def time_calls(call: Callable[[], Any]) -> list[float]:
    """Seconds of calls after one that is not counted.

    Args:
        call: Runs the model once.
    """
    call()
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < MOST_CALLS and time.perf_counter() - begin < BLOCK_SECONDS:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


@contextmanager
def _on_cpu(model: nn.Module) -> Iterator[None]:
    """Context manager: a finished model runs on integers, on the CPU; restored at the end."""
    state: Any = model.gplq
    device, engine, training = next(model.parameters()).device, state.engine, model.training
    try:
        deploy(model.cpu(), 'integer')
        yield
    finally:
        state.engine = set_engine(model, engine)
        model.to(device).train(training)
