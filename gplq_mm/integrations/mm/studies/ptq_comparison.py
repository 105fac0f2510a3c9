# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Compare several weight algorithms, all from one stage-1 checkpoint."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.runner import Runner

from .... import __version__
from ....analysis import REPORT_NAME, format_table, read_json, write_json
from ....analysis.report import bits_label
from ....convert import quantizers
from ....ptq import build_weight_ptq
from ....ptq.corrections.side_branch import compensated_blocks, detach_compensation
from ....ptq.labels import parse_ptq, ptq_label
from ..checkpoints.run_checkpoint import STAGE1_NAME, file_sha256, short_sha256, unwrap
from ..run import weight_stage
from ..run.evaluate import evaluate, validation_key

ROWS_NAME = 'gplq_stage2.json'
_TITLES = {
    'metric': ('metric', 1.0, '{}'),
    'fp32': ('FP32', 1.0, '{:.4g}'),
    'stage1': ('stage 1', 1.0, '{:.4g}'),
    'stage2': ('stage 2', 1.0, '{:.4g}'),
    'weight_mse': ('weight MSE', 1.0, '{:.3g}'),
    'sqnr_db': ('output SQNR (dB)', 1.0, '{:.2f}'),
    'seconds': ('time (s)', 1.0, '{:.1f}'),
    'peak_memory_bytes': ('peak memory (MiB)', 2**20, '{:.0f}'),
    'side_flops': ('side branch FLOPs', 1.0, '{:,.0f}'),
    'side_params': ('side branch parameters', 1.0, '{:,.0f}'),
}
"""Columns of the table: title, divisor of the row's value, format."""


class PTQComparison:
    """Runs stage 2 several times, each time from the runner's initial weights.

    Args:
        runner: Runner with a stage-1 checkpoint loaded.
        checkpoint: That checkpoint. ``gplq_report.json`` in its folder gives the metrics of FP32
            and stage 1 if they are of the same images; else stage 1 is scored and FP32 is left out.
        model_name: Model name in the rows.
    """

    def __init__(self, runner: Runner, checkpoint: str, model_name: str) -> None:
        self.runner, self.model_name = runner, model_name
        self.model = unwrap(runner.model)
        self.state = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.specs = {n: q.spec for n, q in quantizers(self.model, 'weight').items()}
        self.attached = bool(compensated_blocks(self.model))
        self.fp32, self.stage1 = self._earlier_metrics(checkpoint)
        self.digest = file_sha256(checkpoint)
        self.path = Path(runner.work_dir, ROWS_NAME)
        self.finished = read_json(self.path).get('rows', [])
        self.rows: list[dict[str, Any]] = []

    def run(self, ptq: str | None, out: str, bits: int | None, resume: bool = False) -> None:
        """Run one algorithm, or several joined by ``+``; add its rows, write its checkpoint.

        Args:
            ptq: As on the command line; None for the recipe's.
            out: Final checkpoint.
            bits: Weight bits; the recipe's if None.
            resume: Take the rows of an earlier process with the same settings if its
                checkpoint exists.
        """
        run = self._run_key(ptq, out, bits)
        finished = [row for row in self.finished if row.get('run') == run]
        if resume and finished and os.path.isfile(out):
            print_log(f'{ptq}: rows of {self.path}, {out} exists', logger='current')
            self.rows += finished
        else:
            self._restore()
            config = None if ptq is None else parse_ptq(ptq)
            self.rows += self._rows(run, weight_stage.run(self.runner, config, out, bits).data)
        if is_main_process():
            write_json(self.path, {'rows': self.rows})

    def table(self) -> str:
        """The rows as a text table."""
        return comparison_table(self.rows)

    def _run_key(self, ptq: str | None, out: str, bits: int | None) -> str:
        """Hash of everything that an algorithm's rows depend on."""
        cfg = self.runner.cfg
        parts = [self.digest, ptq, os.path.basename(out), bits, __version__]
        parts += [cfg.get('model'), cfg.get('train_dataloader'), validation_key(cfg)]
        return short_sha256(parts)

    def _restore(self) -> None:
        """Restore the stage-1 model."""
        if not self.attached:
            detach_compensation(self.model)
        for name, quantizer in quantizers(self.model, 'weight').items():
            quantizer.set_spec(self.specs[name])
        self.model.load_state_dict(self.state)

    def _earlier_metrics(self, checkpoint: str) -> tuple[dict[str, float], dict[str, float]]:
        path = Path(checkpoint)
        report = read_json(path.with_name(REPORT_NAME)) if path.name == STAGE1_NAME else {}
        if report.get('validation') != validation_key(self.runner.cfg):
            report = {}
        fp32 = report.get('fp32', {}).get('metrics', {})
        stage1 = report.get('stage1', {}).get('metrics', {})
        if not stage1 and self.runner.val_loop is not None:
            print_log(
                'stage 1: no report beside the checkpoint has scores on these images, scoring it',
                logger='current',
            )
            stage1 = evaluate(self.runner, self.runner.val_loop, 'stage 1')
        return fp32, stage1

    def _rows(self, run: str, report: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One row per main metric; one row without a metric if there is no score."""
        found = report['stage2']
        config = report['recipe']['weight']['ptq']
        ptq, names = ptq_label(config), [a.name for a in build_weight_ptq(config)]
        if found['compensation'] and 'qwt' not in names:
            ptq += '+qwt'  # the recipe's own `stage2.compensation`
        metrics = found['metrics']
        scored: list[str | None] = [*main_metrics({**self.fp32, **self.stage1, **metrics})]
        shared = {
            'model': self.model_name,
            'dataset': dataset_name(self.runner.cfg),
            'bits': bits_label(report['recipe'], 'stage2').lower(),
            'ptq': ptq,
        }
        costs = {
            'weight_mse': found['weights']['mean_mse'],
            **{k: found[k] for k in ('sqnr_db', 'seconds', 'peak_memory_bytes')},
            **{k: found[k] for k in ('side_flops', 'side_params')},
        }
        return [
            {
                **shared,
                'metric': name,
                'fp32': self.fp32.get(name or ''),
                'stage1': self.stage1.get(name or ''),
                'stage2': metrics.get(name or ''),
                **costs,
                'run': run,
            }
            for name in scored or [None]
        ]


def main_metrics(metrics: Mapping[str, float]) -> list[str]:
    """The mAPs of a detector, else the first metric.

    Examples:
        >>> main_metrics({'coco/bbox_mAP': 1, 'coco/bbox_mAP_50': 2, 'coco/segm_mAP': 3})
        ['coco/bbox_mAP', 'coco/segm_mAP']
        >>> main_metrics({'accuracy/top1': 70.0, 'accuracy/top5': 90.0})
        ['accuracy/top1']
    """
    return [name for name in metrics if name.endswith('mAP')] or list(metrics)[:1]


def dataset_name(cfg: Mapping[str, Any]) -> str:
    """Folder of the validation images, else the data set's type."""
    dataset = (cfg.get('val_dataloader') or cfg['train_dataloader'])['dataset']
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    root = os.path.basename(os.path.normpath(dataset.get('data_root') or '.'))
    return root if root != '.' else str(dataset['type'])


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a text table, one line per algorithm and metric."""
    titles = ['bits', 'ptq', *(title for title, _, _ in _TITLES.values())]
    lines = [
        [row['bits'].upper(), row['ptq'], *(_cell(row, key) for key in _TITLES)] for row in rows
    ]
    return format_table(titles, lines)


def _cell(row: Mapping[str, Any], key: str) -> str:
    _, unit, text = _TITLES[key]
    value = row.get(key)
    if value is None or isinstance(value, str):
        return value or '-'
    return text.format(value / unit)
