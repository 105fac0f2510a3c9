# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Sensitivity of a checkpoint's operands, measured on training images; a killed run resumes."""

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import barrier, broadcast_object_list, is_main_process
from mmengine.logging import print_log
from mmengine.runner import Runner
from mmengine.utils import ProgressBar
from torch import Tensor

from ....analysis import MacCount, count_macs, read_json, write_json
from ....analysis.operands import (
    ModelOperand,
    Precision,
    activation_precisions,
    baseline,
    check_bits,
    count_elements,
    find_operands,
    weight_precisions,
)
from ....analysis.sensitivity import Measured, SensitivityMeter
from ....calibration.activation_ranges import (
    calibrate_activations,
    calibrate_trained_weights,
    observe_activations,
)
from ....convert import quantized_layers
from ....ptq import GPTQ, SingleLayerGPTQ, WeightPTQ, layerwise_rounding
from ....quantizers import Observer
from ....recipe import Recipe, plain, ptq_of, recipe_difference
from ....stream import all_tensors
from ....stream.distributed import world
from ..checkpoints.checkpoint_io import read_checkpoint
from ..checkpoints.run_checkpoint import (
    check_quantized,
    file_sha256,
    is_quantized_checkpoint,
    load_float_,
    unwrap,
)
from ..data.calibration_data import CalibrationSet
from ..data.loss_data import with_labels
from ..data.model_outputs import IndexedBatch, build_comparison

SENSITIVITY_NAME = 'sensitivity.json'
_MEASURED_WITH = ('scope', 'activation', 'weight', 'rules', 'calibration')
"""Sections of the recipe on which a measurement depends."""
SHARES = 8
"""Images are read in at least this many batches, so that up to 8 ranks see the batches of one."""
KEEP_BYTES = 2**28


@dataclass(frozen=True)
class SensitivityOptions:
    """What to measure.

    Attributes:
        metric: ``sqnr``, ``kl`` or ``loss``.
        bits: Candidate bits.
        kinds: ``weight``, ``activation`` or both.
        num_images: Training images to measure on; the recipe's calibration number if None.
        batch_size: Images per forward pass; if None, the validation's batch size, but at most an
            eighth of the images.
        seed: Seed of the choice of images and of random samplers in the loss.
        include_pinned: Whether to measure operands whose bits a rule of the recipe gives.
        calibrate: Whether a float checkpoint may be calibrated here.
        overwrite: Whether a measurement with other settings may be replaced.
    """

    metric: str = 'sqnr'
    bits: Sequence[int] = (2, 3, 4, 8)
    kinds: Sequence[str] = ('weight', 'activation')
    num_images: int | None = None
    batch_size: int | None = None
    seed: int = 0
    include_pinned: bool = False
    calibrate: bool = False
    overwrite: bool = False


@dataclass
class SensitivityRun:
    """A model ready to be measured, and the results so far.

    Attributes:
        model: Converted model with the checkpoint's weights, calibrated.
        path: JSON file that is kept up to date.
        data: Its content.
        operands: All operands of the model, by key.
        measured: Keys of those that are measured.
        macs: Multiply-accumulates of one image.
        elements: Elements of each activation operand for one image.
        meter: Compares the model with and without quantized operands.
        calibration: Images on which weights are rounded.
        observers: Observed activations by the path of the quantizer.
    """

    model: Any
    path: Path
    data: dict[str, Any]
    operands: dict[str, ModelOperand]
    measured: list[str]
    macs: MacCount
    elements: dict[str, int]
    meter: SensitivityMeter
    calibration: CalibrationSet
    observers: dict[str, Observer] = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        """Kinds that are measured."""
        return self.data['settings']['kinds']

    @cached_property
    def algorithms(self) -> list[WeightPTQ]:
        """Rounding of the weights: as in stage 2, but each layer alone."""
        rounding = layerwise_rounding(ptq_of(self.model.gplq.recipe))
        gptq = rounding[0]
        if not isinstance(gptq, GPTQ):
            return rounding
        model, folder = self.model, str(self.path.parent)
        with baseline(model, True):
            run = self.calibration.run_pass(model, 'inputs of the layers')
            layers = quantized_layers(model)
            return [SingleLayerGPTQ(gptq, model, layers, run, KEEP_BYTES, folder)]

    @property
    def increases(self) -> dict[str, dict[int, float]]:
        """Error increase (``damage`` in the file) by operand key and bits."""
        found = self.data['operands']
        return {k: {int(b): d for b, d in found[k]['damage'].items()} for k in self.measured}

    @property
    def errors(self) -> dict[str, dict[int, Tensor]]:
        """Random projections of the errors by operand key and bits; some metrics have none."""
        bits, found = self.data['settings']['bits'], self.data['sketches']
        rows = {k: _unpacked(found[k], len(bits)) for k in self.measured if k in found}
        return {k: dict(zip(bits, own, strict=True)) for k, own in rows.items()}

    def precisions(self, key: str, bits: Sequence[int]) -> dict[int, Precision]:
        """An operand quantized to each of some bits."""
        operand = self.operands[key]
        if operand.kind == 'weight':
            return weight_precisions(self.model, operand, bits, self.algorithms)
        return activation_precisions(self.observers[operand.path], bits)

    def measure(self) -> None:
        """Measure every operand that is not in the file yet; write the file after each.

        Raises:
            ValueError: If outputs are NaN or infinite.
        """
        todo = [key for key in self.measured if key not in self.data['operands']]
        if len(todo) < len(self.measured):
            done = len(self.measured) - len(todo)
            print_log(f'{self.path}: {done} operands are measured already', logger='current')
        if any(self.operands[key].kind == 'weight' for key in todo):
            names = ', '.join(a.name for a in self.algorithms)
            print_log(f'weights are rounded by {names}, each layer alone', logger='current')
        bar = ProgressBar(len(todo)) if todo and is_main_process() else None
        with baseline(self.model, False):
            for key in todo:
                precisions = self.precisions(key, self.data['settings']['bits'])
                self._record(key, self.meter.measure(self.operands[key], precisions))
                if bar is not None:
                    bar.update()
        if bar is not None:
            bar.file.write('\n')
        self._warn_of_idle_operands()
        barrier()

    def measure_together(self, bits: Mapping[str, int]) -> float:
        """Error increase with all operands of the measured kinds quantized at once."""
        chosen = {
            self.operands[key].path: self.precisions(key, [value])[value]
            for key, value in bits.items()
            if self.operands[key].kind in self.kinds
        }
        with baseline(self.model, False):
            return self.meter.measure_together(chosen).increase

    def write(self) -> None:
        """Write the file (main process only)."""
        if is_main_process():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.data)

    def _record(self, key: str, found: Mapping[int, Measured]) -> None:
        metric, operand = self.meter.metric, asdict(self.operands[key])
        increase = {b: measured.increase for b, measured in found.items()}
        sketches = torch.stack([measured.sketch for measured in found.values()])
        if sketches.numel():
            self.data['sketches'][key] = _packed(sketches)
        self.data['operands'][key] = {
            **{k: operand[k] for k in ('name', 'kind', 'role', 'num_bits', 'weights')},
            'elements': self.elements.get(key, 0),
            'damage': {str(b): d for b, d in increase.items()},
            'score': {str(b): metric.score(d) for b, d in increase.items()},
        }
        self.write()

    def _warn_of_idle_operands(self) -> None:
        idle = [k for k, increase in self.increases.items() if not any(increase.values())]
        if idle:
            print_log(
                f'{len(idle)} operand(s) change nothing at any bits, first {idle[0]}: these '
                'images or this metric do not reach them',
                logger='current',
                level=30,
            )


def prepare(runner: Runner, checkpoint: str, options: SensitivityOptions) -> SensitivityRun:
    """Load a checkpoint, choose the images, find the operands and earlier measurements.

    Args:
        runner: Runner with the converted model; loads nothing by itself.
        checkpoint: ``gplq_calibrated.pth``, ``gplq_stage1.pth``, or with
            ``options.calibrate`` an FP32 checkpoint.
        options: What to measure.

    Raises:
        ValueError: For an unknown metric, kind or bits, for a checkpoint that is not
            calibrated or past stage 1, or if the file in the work dir was measured with
            other settings.
    """
    model = unwrap(runner.model)
    recipe, bits = model.gplq.recipe, check_bits(options.bits)
    metric, forward = build_comparison(model, options.metric, options.seed)
    found = find_operands(model, recipe.rules)
    kinds = sorted({o.kind for o in find_operands(model, (), options.kinds).values()})
    measured = _choose(found, kinds, options.include_pinned)
    calibration = CalibrationSet.of_recipe(runner.cfg, recipe)
    images = _image_set(runner.cfg, recipe, options)
    load(model, checkpoint, calibration, options.calibrate)
    settings = {
        'checkpoint': file_sha256(checkpoint),
        'recipe': {k: plain(getattr(recipe, k)) for k in _MEASURED_WITH},
        'metric': options.metric,
        'bits': bits,
        'kinds': kinds,
        'images': [len(images.indices), len(images.batches), options.seed],
        'include_pinned': options.include_pinned,
        'rounding': [a.name for a in layerwise_rounding(ptq_of(recipe))],
    }
    path = Path(runner.work_dir) / SENSITIVITY_NAME
    data = _known(path, settings, options.overwrite)
    data.setdefault('unit', metric.unit)
    batch = images.load(0)
    size = len(images.batches[0])
    observers = {}
    if 'activation' in kinds:
        with baseline(model, False):
            observers = observe_activations(model, calibration.run_pass(model, 'observation'))
    with baseline(model, True):
        macs = count_macs(model, lambda: model.test_step(batch))
        elements = count_elements(model, found, lambda: model.test_step(batch))
    return SensitivityRun(
        model,
        path,
        data,
        found,
        measured,
        MacCount(macs.total // size, {n: m // size for n, m in macs.layers.items()}),
        {key: number // size for key, number in elements.items()},
        SensitivityMeter(model, metric, forward, _Batches(images).__iter__, KEEP_BYTES),
        calibration,
        observers,
    )


def load(model: Any, path: str, calibration: CalibrationSet, calibrate: bool) -> None:
    """Load a checkpoint up to stage 1, or a float one that is then calibrated.

    Args:
        model: Converted model.
        path: Checkpoint.
        calibration: Images that set the ranges of a float checkpoint.
        calibrate: Whether a float checkpoint is accepted.

    Raises:
        ValueError: If the checkpoint is float and ``calibrate`` is not set, if its weights are
            quantized already, or if it does not fit the model.
    """
    checkpoint = read_checkpoint(path)
    if is_quantized_checkpoint(checkpoint):
        check_quantized(model, checkpoint)
        if checkpoint['gplq']['stage'] == 'stage2':
            raise ValueError(
                f'{path}: the weights are already quantized, nothing is left to measure; give '
                'gplq_calibrated.pth, gplq_stage1.pth or the FP32 checkpoint'
            )
        if calibrate:
            print_log('--calibrate has no effect: the checkpoint is calibrated', 'current', 30)
        state = checkpoint['state_dict']
        model.load_state_dict({k.removeprefix('module.'): v for k, v in state.items()})
        return
    if not calibrate:
        raise ValueError(
            f'{path} is a float checkpoint, its quantizers were never calibrated; add --calibrate '
            f'to set the ranges on {len(calibration.indices)} training images now, or give the '
            'gplq_calibrated.pth or gplq_stage1.pth of a run'
        )
    load_float_(model, checkpoint)
    calibrate_activations(model, calibration.run_pass(model, 'calibration'))
    calibrate_trained_weights(model)


class _Batches:
    """This rank's batches with their number, kept in memory up to a limit."""

    def __init__(self, images: CalibrationSet) -> None:
        self.images = images
        self.free_bytes = KEEP_BYTES
        self.kept: dict[int, Any] = {}

    def __iter__(self) -> Iterator[IndexedBatch]:
        rank, size = world()
        for number in range(rank, len(self.images.batches), size):
            batch = self.kept.get(number)
            if batch is None:
                batch = self.images.load(number)
                self._keep(number, batch)
            yield number, batch

    def _keep(self, number: int, batch: Any) -> None:
        size = sum(t.numel() * t.element_size() for t in all_tensors(batch))
        if size <= self.free_bytes:
            self.free_bytes -= size
            self.kept[number] = batch


def _packed(sketches: Tensor) -> str:
    """``(bits, SKETCH)`` as text: little-endian float32 in base64."""
    values = sketches.cpu().numpy().astype('<f4')
    return base64.b64encode(values.tobytes()).decode('ascii')


def _unpacked(text: str, rows: int) -> Tensor:
    values = np.frombuffer(base64.b64decode(text), '<f4').reshape(rows, -1)
    return torch.from_numpy(values.astype(np.float64))


def _choose(operands: Mapping[str, ModelOperand], kinds: Sequence[str], pinned: bool) -> list[str]:
    """Keys of the operands to measure."""
    chosen = [k for k, o in operands.items() if o.kind in kinds and (pinned or not o.pinned)]
    if not chosen:
        raise ValueError(
            f'a rule of the recipe gives the bits of every {" and ".join(kinds)}; add '
            '--include-pinned to measure them anyway'
        )
    return chosen


def _image_set(cfg: Config, recipe: Recipe, options: SensitivityOptions) -> CalibrationSet:
    number = options.num_images or int(recipe.calibration.num_images)
    loader = cfg.get('val_dataloader') or cfg.get('test_dataloader') or {}
    size = options.batch_size or min(loader.get('batch_size', 1), math.ceil(number / SHARES))
    if options.metric == 'loss':
        cfg = with_labels(cfg)
    fewer = options.num_images is None and recipe.calibration.all_if_fewer
    return CalibrationSet(cfg, number, options.seed, size, fewer)


def _known(path: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """Content of the file as the main process reads it, or an empty measurement.

    Raises:
        ValueError: If it was measured with other settings and may not be overwritten.
    """
    held: list[Any] = [read_json(path) if is_main_process() else None]
    broadcast_object_list(held)
    data = held[0]
    differences = recipe_difference(data['settings'], settings) if data else []
    if differences and not overwrite:
        raise ValueError(
            f'{path} was measured with other settings ({"; ".join(differences[:3])}); give '
            'another --work-dir, or --overwrite'
        )
    return (
        data
        if data and not differences
        else {
            'settings': settings,
            'operands': {},
            'sketches': {},
        }
    )
