# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Several weight algorithms from one checkpoint: each is as if it ran alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gplq_mm.convert import quantizers
from gplq_mm.integrations.mm.checkpoints.checkpoint_io import read_checkpoint
from gplq_mm.integrations.mm.data.calibration_data import CalibrationSet
from gplq_mm.integrations.mm.run import weight_stage
from gplq_mm.integrations.mm.studies.ptq_comparison import PTQComparison
from gplq_mm.ptq.corrections.side_branch import compensated_blocks
from gplq_mm.ptq.rounding.adaround import AdaRound
from tests.helpers.gplq_runs import assert_same_weights
from tests.helpers.runners import RECIPE, gplq_config, make_runner
from tests.test_integrations.test_mm.conftest import FinishedRun

COLUMNS = (
    'model dataset bits ptq metric fp32 stage1 stage2 weight_mse sqnr_db seconds '
    'peak_memory_bytes side_flops side_params run'
)


def compared(
    finished: FinishedRun, work_dir: Path, ptqs: list[str], bits: int | None = None, **config: Any
):
    """As tools/ptq.py does it."""
    checkpoint = str(finished.work_dir / 'gplq_stage1.pth')
    runner = make_runner(gplq_config(finished.project, checkpoint, work_dir, **config))
    runner.call_hook('before_run')
    runner.load_checkpoint(checkpoint)
    comparison = PTQComparison(runner, checkpoint, 'tiny')
    for ptq in ptqs:
        comparison.run(ptq, str(work_dir / f'{ptq}.pth'), bits, resume=True)
    return comparison


def test_each_algorithm_starts_from_the_checkpoint(finished: FinishedRun, tmp_path: Path) -> None:
    comparison = compared(finished, tmp_path / 'all', ['minmax+qwt', 'gptq', 'minmax'])
    compared(finished, tmp_path / 'one', ['gptq'])
    assert_same_weights(tmp_path / 'all' / 'gptq.pth', tmp_path / 'one' / 'gptq.pth')
    assert_same_weights(tmp_path / 'all' / 'minmax.pth', finished.work_dir / 'gplq_final.pth')
    rows = json.loads((tmp_path / 'all' / 'gplq_stage2.json').read_text())['rows']
    assert [row['ptq'] for row in rows] == ['minmax+qwt', 'gptq', 'minmax']
    assert all(list(row) == COLUMNS.split() for row in rows)
    assert [row['side_params'] for row in rows[1:]] == [0, 0]  # branches of the first are gone
    assert [row['side_flops'] for row in rows[1:]] == [0, 0]
    assert all(row['bits'] == 'w4a4' and row['fp32'] is not None for row in rows)
    assert all(row['seconds'] > 0 and row['sqnr_db'] > 0 for row in rows)
    assert not compensated_blocks(comparison.model)
    assert len(comparison.table().splitlines()) == 2 + 3
    assert not (tmp_path / 'all' / weight_stage.UNITS_FOLDER).exists()


def test_a_killed_comparison_goes_on_with_the_algorithm_it_was_at(
    finished: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    original = AdaRound.quantize_unit

    def quantize_unit(self: AdaRound, task: Any, unit: Any, *args: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        original(self, task, unit, *args)
        done.append(unit.name)

    monkeypatch.setattr(AdaRound, 'quantize_unit', quantize_unit)
    with pytest.raises(KeyboardInterrupt):
        compared(finished, tmp_path, ['minmax', 'adaround'])
    before = (tmp_path / 'minmax.pth').stat().st_mtime_ns
    done[:] = ['as before']
    original_units = len(finished.runner.model.backbone.layers) + 2  # patch embedding and head
    monkeypatch.setattr(AdaRound, 'quantize_unit', _counting(original, done))
    comparison = compared(finished, tmp_path, ['minmax', 'adaround'])
    assert len(done) - 1 == original_units - 2
    assert (tmp_path / 'minmax.pth').stat().st_mtime_ns == before
    assert [row['ptq'] for row in comparison.rows] == ['minmax', 'adaround']
    assert not (tmp_path / weight_stage.UNITS_FOLDER).exists()
    (tmp_path / 'minmax.pth').unlink()
    compared(finished, tmp_path, ['minmax'])
    assert (tmp_path / 'minmax.pth').is_file()


def _counting(original: Any, done: list[str]) -> Any:
    def quantize_unit(self: AdaRound, task: Any, unit: Any, *args: Any) -> None:
        original(self, task, unit, *args)
        done.append(unit.name)

    return quantize_unit


def test_each_checkpoint_has_its_own_report(finished: FinishedRun, tmp_path: Path) -> None:
    before = (finished.work_dir / 'gplq_report.json').read_text()
    compared(finished, finished.work_dir, ['mse'], bits=2)
    assert (finished.work_dir / 'gplq_report.json').read_text() == before
    told = json.loads((finished.work_dir / 'mse_report.json').read_text())
    assert (told['recipe']['weight']['ptq'], told['recipe']['weight']['num_bits']) == ('mse', 2)
    assert told['engine'] == json.loads(before)['engine'] != ''
    for name in ('mse.pth', 'mse_report.json', 'gplq_stage2.json'):
        (finished.work_dir / name).unlink()


def test_scores_on_other_images_are_not_set_beside(finished: FinishedRun, tmp_path: Path) -> None:
    half = {'val_dataloader.dataset.indices': 4}
    comparison = compared(finished, tmp_path, ['minmax'], **half)
    (row,) = comparison.rows
    assert row['fp32'] is None and row['stage1'] == comparison.stage1[row['metric']]


def test_a_model_without_a_score_has_a_row(
    finished: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mmdet's metric gives nothing where a detector finds nothing."""
    monkeypatch.setattr(weight_stage, 'evaluate', lambda *_: {})
    comparison = compared(finished, tmp_path, ['minmax'])
    (row,) = comparison.rows
    assert row['stage2'] is None and row['stage1'] is not None and row['sqnr_db'] > 0
    assert ' - |' in comparison.table()


def test_a_model_whose_outputs_cannot_be_compared_is_quantized_all_the_same(
    finished: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> None:
        raise NotImplementedError('no tensor mode')

    monkeypatch.setattr('gplq_mm.integrations.mm.data.model_outputs._RawOutputs.__call__', refuses)
    (row,) = compared(finished, tmp_path, ['minmax']).rows
    assert row['sqnr_db'] is None and row['stage2'] is not None


def test_bits_of_rules_stay_where_they_are_the_recipes_too(
    finished: FinishedRun, tmp_path: Path
) -> None:
    recipe = dict(base='w8a8', rules=[dict(name='head.*', num_bits=8)], mimic=None)
    runner = make_runner(gplq_config(finished.project, finished.checkpoint, tmp_path, recipe))
    weight_stage.set_weight_bits(runner.model, 4)
    found = quantizers(runner.model, 'weight')
    kept = {n for n, q in found.items() if q.spec.num_bits == 8}
    assert kept == {n for n in found if n.startswith(('backbone.patch_embed', 'head.'))}
    for quantizer in found.values():
        assert tuple(quantizer.quant_range.tolist()) == tuple(quantizer.spec.quant_range)


def test_other_weight_bits_from_the_same_checkpoint(finished: FinishedRun, tmp_path: Path) -> None:
    comparison = compared(finished, tmp_path, ['minmax'], bits=3)
    assert comparison.rows[0]['bits'] == 'w3a4'
    saved = read_checkpoint(tmp_path / 'minmax.pth')
    assert saved['gplq']['recipe']['weight']['num_bits'] == 3
    bits = {q.spec.num_bits for q in quantizers(comparison.model, 'weight').values()}
    assert bits == {3, 8}  # image and predictor stay as the rules say
    recipe = {**RECIPE, 'weight': {**RECIPE['weight'], 'num_bits': 3}}
    fresh = make_runner(gplq_config(finished.project, None, tmp_path / 'again', recipe))
    fresh.model.load_state_dict(saved['state_dict'])
    for name, value in fresh.model.state_dict().items():
        assert torch.equal(value, saved['state_dict'][name])


def test_fewer_images_than_asked_for_are_all_used(finished: FinishedRun, tmp_path: Path) -> None:
    runner = make_runner(gplq_config(finished.project, finished.checkpoint, tmp_path))
    recipe = runner.model.gplq.recipe.change(stage2={'num_images': 10**6})
    calibration = CalibrationSet.of_recipe(runner.cfg, recipe)
    images = weight_stage.stage2_set(runner.cfg, recipe, calibration)
    assert len(images.indices) == len(images.dataset) < 10**6
    recipe = recipe.change(stage2={})
    assert weight_stage.stage2_set(runner.cfg, recipe, calibration) is calibration


@pytest.mark.parametrize('bits', [1, 9])
def test_bits_out_of_range_are_refused(finished: FinishedRun, tmp_path: Path, bits: int) -> None:
    with pytest.raises(ValueError, match='from 2 to 8'):
        compared(finished, tmp_path, ['minmax'], bits)
