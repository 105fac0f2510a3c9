# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The report of a work dir across processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gplq_mm.convert import convert_, resolve_recipe, set_quantization
from gplq_mm.integrations.mm.run.run_report import RunReport, versions
from tests.helpers.models import Detector, image

RECIPE = resolve_recipe(dict(base='w3a3', scope='all', rules=[]))


def written(work_dir: Path) -> dict[str, Any]:
    return json.loads((work_dir / 'gplq_report.json').read_text())


def test_every_update_is_on_disk_at_once(tmp_path: Path) -> None:
    report = RunReport(str(tmp_path / 'new'), resume=False)
    report.describe(RECIPE, dict(counts={}), seed=5)
    report.update('fp32', metrics={'acc': 1.0})
    report.update('fp32', seconds=2.0)
    content = written(tmp_path / 'new')
    assert content['fp32'] == {'metrics': {'acc': 1.0}, 'seconds': 2.0}
    assert content['recipe'] == RECIPE
    assert content['seed'] == 5


def test_a_resume_keeps_what_an_earlier_process_wrote(tmp_path: Path) -> None:
    first = RunReport(str(tmp_path), resume=False)
    assert first.stage1_iterations() is None
    first.update('stage1', metrics={'acc': 1.0}, iterations=12)
    resumed = RunReport(str(tmp_path), resume=True)
    assert resumed.stage1_iterations() == 12
    resumed.update('stage2', seconds=1.0)
    assert written(tmp_path)['stage1']['metrics'] == {'acc': 1.0}
    assert RunReport(str(tmp_path), resume=False).data == {}


def test_tensors_become_numbers(tmp_path: Path) -> None:
    RunReport(str(tmp_path), resume=False).update('fp32', metrics={'acc': torch.tensor(0.5)})
    assert written(tmp_path)['fp32']['metrics'] == {'acc': 0.5}


class Steps(Detector):
    """Has the step that MMEngine's models have."""

    def test_step(self, batch: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return self(batch)


def test_cost_of_a_stage_and_of_fp32(tmp_path: Path) -> None:
    model = Steps()
    convert_(model, RECIPE)
    set_quantization(model, False)
    report = RunReport(str(tmp_path), resume=False)
    report.count_macs(model, image())
    assert model.training
    content = written(tmp_path)
    assert content['fp32']['bops'] == content['stage1']['bops'] > 0
    numbers = sum(p.numel() for n, p in model.named_parameters() if 'quantizer' not in n)
    assert content['stage1']['model_bytes'] == 4 * numbers
    assert 'model_bytes' not in content['fp32']
    assert content['stage1']['mean_bits'] == {'weight': 32, 'activation': 32}
    operands = {(o['name'], o['kind']): o['bits'] for o in content['operands']}
    assert set(operands.values()) == {3, 8}  # the image has 8
    report.update_cost('stage2', model, side_macs=10)
    assert written(tmp_path)['stage2']['bops'] == content['stage1']['bops'] + 10 * 1024


def test_versions_of_what_is_installed() -> None:
    found = versions()
    assert found['torch'] == torch.__version__
    assert {'gplq_mm', 'python', 'torch', 'mmengine'} <= set(found)


def test_versions_leave_out_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, 'mmdet', None)
    assert 'mmdet' not in versions()


def test_seconds_of_a_killed_stage_are_kept_until_it_ends(tmp_path: Path) -> None:
    killed = RunReport(str(tmp_path), resume=False)
    killed.keep_unfinished('stage2', 3.0)
    resumed = RunReport(str(tmp_path), resume=True)
    assert resumed.take_unfinished('stage2') == 3.0
    assert resumed.take_unfinished('stage2') == 0.0
    resumed.update('stage2', seconds=5.0)
    assert list(RunReport(str(tmp_path), resume=True).data) == ['stage2']
    assert RunReport(str(tmp_path), resume=False).take_unfinished('stage2') == 0.0
