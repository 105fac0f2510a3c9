# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Base class of algorithms that quantize one unit after the other with its calibration inputs."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..convert.model_facts import facts_of
from ..ops import QuantizedLayer
from ..stream import CallStore, Unit, UnitStream, find_units
from ..stream.distributed import on_all_ranks
from .finished_units import FinishedUnits
from .ranges.for_rounding import set_range
from .task import CORRECTS, PTQTask, WeightPTQ, write_nearest


class UnitPTQ(WeightPTQ):
    """Visits the units in execution order: earlier units are quantized, later ones are not."""

    needs_data: ClassVar[bool] = True
    needs_reference: bool = False
    """Whether ``quantize_unit`` also gets the unit's inputs in the stage-1 model."""

    @abstractmethod
    def quantize_unit(
        self, task: PTQTask, unit: Unit, inputs: CallStore, reference: CallStore | None
    ) -> None:
        """Quantize the unit's layers.

        Args:
            task: The task.
            unit: The unit; its layers have float weights, or the codes of an earlier
                algorithm.
            inputs: Its inputs in the quantized model.
            reference: Its inputs in the stage-1 model for the same images in the same
                order; None unless ``needs_reference``, and if the two do not correspond.
        """

    def begin(self, task: PTQTask, units: Sequence[Unit]) -> None:
        """Called once, before the first unit that is not finished."""

    def options(self) -> dict[str, Any]:
        """Options that the result depends on; part of the key of finished units."""
        return {k: v for k, v in vars(self).items() if not k.startswith('_')}

    def apply(self, task: PTQTask) -> None:
        """Quantize unit by unit; a finished unit is stored in ``task.folder``.

        Raises:
            ValueError: If the calibration images reach no layer.
        """
        assert task.run_pass is not None
        units = find_units(task.model, task.layers, task.run_pass)
        if not units:
            raise ValueError(
                'stage 2: the calibration images reach no quantized layer; the calibration set '
                'is empty, or run_pass calls another model'
            )
        title = f'{type(self).__name__} {self.options()} {task.seed} {task.data_key}'
        finished = FinishedUnits(task.folder, title, task.model)
        self._quantize_unreached(task, units)
        done = finished.restore_first(unit.module for unit in units)
        if done < len(units):
            self.begin(task, units)
        stream, reference = self._streams(task, units)
        for index in range(done, len(units)):
            unit = units[index]
            task.report(unit.name, index, len(units))
            inputs = stream.inputs(index)
            reference_inputs = reference.inputs(index) if reference else None
            if reference_inputs is not None and not on_all_ranks(
                _takes_given_samples(task, unit) and paired(inputs, reference_inputs)
            ):
                task.note(
                    f'{unit.name}: its inputs in the quantized and in the stage-1 model do not '
                    f'correspond; {self.name} fits its outputs on the quantized inputs'
                )
                reference_inputs = None
            self.quantize_unit(task, unit, inputs, reference_inputs)
            finished.save(index, unit.module)

    def _streams(self, task: PTQTask, units: list[Unit]) -> tuple[UnitStream, UnitStream | None]:
        assert task.run_pass is not None
        budget = task.budget_bytes // (2 if self.needs_reference else 1)
        stream = UnitStream(task.model, units, task.run_pass, None, budget, task.folder)
        if not self.needs_reference:
            return stream, None
        return stream, UnitStream(
            task.model, units, task.run_pass, task.stage1, budget, task.folder
        )

    def _quantize_unreached(self, task: PTQTask, units: list[Unit]) -> None:
        if self.phase == CORRECTS:
            return
        reached = {name for unit in units for name in unit.layers}
        for name in task.layers.keys() - reached:
            task.note(f'{name}: no calibration image reaches it; rounded to nearest, mse range')
            round_to_nearest(task, name)


def round_to_nearest(task: PTQTask, name: str) -> None:
    """Round a layer to nearest, with its range or one of least squared error."""
    layer = task.layers[name]
    if not layer.weight_quantizer.is_calibrated:
        set_range(layer, task.float_weights[name], 'mse')
    write_nearest(layer, task.float_weights[name])


def _takes_given_samples(task: PTQTask, unit: Unit) -> bool:
    """Whether a unit gets what the model is given; False if the model chooses its samples."""
    return not set(facts_of(task.model).unpaired).intersection(unit.name.split('.'))


@torch.no_grad()
def paired(inputs: CallStore, reference: CallStore) -> bool:
    """Whether the inputs in two models correspond, call by call and element by element.

    Unrelated inputs are detected by unequal shapes or a large difference of the values.
    """
    if len(inputs) != len(reference):
        return False
    return all(
        len(quantized.tensors) == len(stage1.tensors)
        and all(map(_related, quantized.tensors, stage1.tensors))
        for quantized, stage1 in zip(inputs, reference, strict=True)
    )


def _related(quantized: Tensor, stage1: Tensor) -> bool:
    if quantized.shape != stage1.shape:
        return False
    error = (quantized.double() - stage1.double()).square().sum()
    return bool(error <= stage1.double().square().sum())


def codes_of(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """Centred integer codes of a layer's input, shape of ``x``: factors of its weight codes."""
    return layer.input_quantizer.codes(x)[0]
