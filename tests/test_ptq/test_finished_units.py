# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
from pathlib import Path

import torch
from torch import nn

from gplq_mm.ptq.finished_units import FinishedUnits


def model(value: float) -> nn.ModuleList:
    """Three units, all weights equal to `value`."""
    units = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    with torch.no_grad():
        for parameter in units.parameters():
            parameter.fill_(value)
    return units


def stored(tmp_path: Path) -> Path:
    """Folder of a killed run that finished three units, all ones."""
    finished = FinishedUnits(str(tmp_path), 'gptq', model(0.0))
    for index, unit in enumerate(model(1.0)):
        finished.save(index, unit)
    (folder,) = tmp_path.iterdir()
    return folder


def test_finished_units_are_those_of_the_same_run(tmp_path: Path) -> None:
    stored(tmp_path)
    for title, value, expected in (('gptq', 0.0, 3), ('gptq', 0.5, 0), ('mse', 0.0, 0)):
        units = model(value)
        finished = FinishedUnits(str(tmp_path), title, units)
        assert finished.restore_first(units) == expected
        restored = [torch.equal(unit.weight, torch.ones(2, 2)) for unit in units]
        assert restored == [expected > 0] * 3


def test_a_damaged_unit_and_later_ones_are_computed_again(tmp_path: Path) -> None:
    damaged = stored(tmp_path) / 'unit_001.pt'
    damaged.write_bytes(b'garbage')
    units = model(0.0)
    finished = FinishedUnits(str(tmp_path), 'gptq', units)
    assert finished.restore_first(units) == 1
    assert [float(unit.weight.mean()) for unit in units] == [1.0, 0.0, 0.0]
    assert not damaged.exists()


def test_nothing_is_stored_without_a_folder() -> None:
    finished = FinishedUnits(None, 'gptq', model(0.0))
    finished.save(0, model(1.0)[0])
    assert finished.restore_first(model(0.0)) == 0
