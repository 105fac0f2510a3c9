# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""From a checkpoint to sensitivities, bits under a budget, and a config that has them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip('mmpretrain')

from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from gplq_mm.analysis import bit_operations, count_macs, model_bytes
from gplq_mm.analysis.operands import find_operands
from gplq_mm.calibration.activation_ranges import calibrate_activations
from gplq_mm.integrations.mm.checkpoints.checkpoint_io import read_checkpoint
from gplq_mm.integrations.mm.checkpoints.run_checkpoint import check_quantized, load_float_, record
from gplq_mm.integrations.mm.data.calibration_data import CalibrationSet
from gplq_mm.integrations.mm.studies import measured_sensitivity
from gplq_mm.ptq.stage2 import run_stage2
from tests.helpers.gplq_runs import write_gplq_config
from tests.helpers.pages import read_page
from tests.helpers.tiny_projects import TinyProject, our_tool, run_ok
from tests.helpers.tools import load_tool

RECIPE = (
    "dict(base='w4a4', calibration=dict(num_images=4), activation=dict(observer='minmax'), "
    "weight=dict(ptq='minmax'))"
)
IMAGES = ('--num-images', 4, '--batch-size', 2)
tool = load_tool('sensitivity')


@pytest.fixture(scope='module')
def config(project: TinyProject, fp32: Path) -> Path:
    return write_gplq_config(project, fp32, 'mixed_base', RECIPE)


@pytest.fixture(autouse=True)
def in_project(project: TinyProject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root)


def run(config: Path, checkpoint: Path, work_dir: Path, *words: object) -> dict[str, Any]:
    """Run the tool in this process, quietly; return what it wrote."""
    common = ('--work-dir', work_dir, '--bits', 2, 3, 4, *IMAGES)
    options = ('--cfg-options', 'log_level=WARNING')
    tool.main([str(w) for w in (config, checkpoint, *common, *words, *options)])
    return json.loads((work_dir / 'sensitivity.json').read_text())


@pytest.fixture(scope='module')
def mixed(
    project: TinyProject, config: Path, fp32: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Work dir of a finished measurement with an assignment under two budgets."""
    work_dir = tmp_path_factory.mktemp('mixed')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.root)
        budget = ('--mean-weight-bits', 3, '--mean-activation-bits', 3.5)
        run(config, fp32, work_dir, '--calibrate', *budget)
    return work_dir


def data_of(work_dir: Path) -> dict[str, Any]:
    return json.loads((work_dir / 'sensitivity.json').read_text())


def build(cfg: Config) -> Any:
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(cfg.model).eval()


def test_every_free_operand_is_measured(mixed: Path, config: Path) -> None:
    data = data_of(mixed)
    model = build(Config.fromfile(config))
    operands = find_operands(model, model.gplq.recipe.rules)
    assert list(data['operands']) == [k for k, o in operands.items() if not o.pinned]
    assert set(data['sketches']) == set(data['operands'])
    for key, operand in data['operands'].items():
        assert set(operand['damage']) == {'2', '3', '4'}
        assert operand['damage']['2'] >= operand['damage']['4'] > 0
        if operands[key].role != 'softmax':  # on flat rows all powers of two but the first are idle
            assert operand['damage']['2'] > operand['damage']['4']
        assert operand['weights'] > 0 or operand['elements'] > 0


def test_written_config_has_exactly_the_assigned_bits(mixed: Path, config: Path) -> None:
    assignment = data_of(mixed)['assignment']
    cfg = Config.fromfile(mixed / 'mixed_recipe.py')
    assert cfg.train_dataloader == Config.fromfile(config).train_dataloader
    model = build(cfg)
    assert {k: o.num_bits for k, o in find_operands(model).items()} == assignment['bits']
    assert len(set(assignment['bits'].values())) > 2


@pytest.mark.parametrize(('kind', 'bound'), [('weight', 3.0), ('activation', 3.5)])
def test_budget_is_respected_and_used(mixed: Path, kind: str, bound: float) -> None:
    data = data_of(mixed)
    bits, size = data['assignment']['bits'], 'weights' if kind == 'weight' else 'elements'
    own = {k: o for k, o in data['operands'].items() if o['kind'] == kind}
    mean = sum(o[size] * bits[k] for k, o in own.items()) / sum(o[size] for o in own.values())
    assert bound - 0.3 < mean <= bound
    row = next(r for r in data['assignment']['settings'] if r['name'] == 'mixed')
    assert row[f'{kind}_bits'] == pytest.approx(mean)


def test_assignment_is_no_worse_than_uniform_bits_of_its_budget(
    config: Path, fp32: Path, tmp_path: Path
) -> None:
    words = ('--kind', 'weight', '--mean-weight-bits', 3)
    rows = run(config, fp32, tmp_path, '--calibrate', *words)['assignment']['settings']
    found = {row['name']: row for row in rows}
    assert set(found) == {'W4A4', 'W3A4', 'W3A3', 'mixed'}
    assert found['mixed']['bops'] <= found['W3A4']['bops'] * 1.01
    assert found['mixed']['damage'] <= found['W3A4']['damage']
    assert found['W3A3']['damage'] is None  # activations were not measured


def test_cost_is_that_of_the_quantized_model(mixed: Path, fp32: Path) -> None:
    """What the tool plans is what the built, calibrated, quantized model counts."""
    cfg = Config.fromfile(mixed / 'mixed_recipe.py')
    model = build(cfg)
    load_float_(model, read_checkpoint(fp32))
    images = CalibrationSet(cfg, 4, 0, 1)
    calibrate_activations(model, images.run_pass(model, 'calibration'))
    run_stage2(model, model.gplq.recipe)
    macs = count_macs(model, lambda: model.test_step(images.load(0)))
    row = next(r for r in data_of(mixed)['assignment']['settings'] if r['name'] == 'mixed')
    assert row['bops'] == bit_operations(model, macs)
    assert row['model_bytes'] == model_bytes(model)


@pytest.mark.parametrize('budget', ['w3a3', '0.00002'])
def test_bops_are_bounded(config: Path, fp32: Path, mixed: Path, budget: str) -> None:
    """From the finished measurement; nothing is measured again but the settings."""
    before = data_of(mixed)['operands']
    if budget != 'w3a3':
        with pytest.raises(ValueError, match=r'cannot be met; .* reach from .* G BOPs'):
            run(config, fp32, mixed, '--calibrate', '--bops', budget)
        return
    data = run(config, fp32, mixed, '--calibrate', '--bops', budget, '--out', str(mixed / 'b.py'))
    assert data['operands'] == before
    rows = {row['name']: row for row in data['assignment']['settings']}
    assert rows['mixed']['bops'] <= rows['W3A3']['bops']
    assert rows['mixed']['damage'] <= rows['W3A3']['damage']
    assert (mixed / 'b.py').is_file()


def test_killed_and_resumed_equals_uninterrupted(
    config: Path, fp32: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    write, writes = measured_sensitivity.SensitivityRun.write, []

    def write_thrice(self: Any) -> None:
        write(self)
        writes.append(0)
        if len(writes) == 3:
            raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(measured_sensitivity.SensitivityRun, 'write', write_thrice)
        run(config, fp32, tmp_path, '--calibrate')
    half = data_of(tmp_path)
    assert len(half['operands']) == 3
    measured = []
    measure = measured_sensitivity.SensitivityMeter.measure
    monkeypatch.setattr(
        measured_sensitivity.SensitivityMeter,
        'measure',
        lambda self, o, p: measured.append(o.key) or measure(self, o, p),
    )
    whole = run(config, fp32, tmp_path, '--calibrate')
    reference = data_of(mixed)
    assert whole['operands'] == reference['operands']
    assert whole['sketches'] == reference['sketches']
    assert measured == list(whole['operands'])[3:]


def test_two_processes_measure_the_bits_of_one(
    project: TinyProject, config: Path, fp32: Path, mixed: Path, tmp_path: Path
) -> None:
    launch = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
    words = ('--bits', 2, 3, 4, *IMAGES, '--calibrate')
    command = (*launch, our_tool('sensitivity'), config, fp32, '--launcher', 'pytorch')
    run_ok(*command, '--work-dir', tmp_path, *words, cwd=project.root)
    two, one = data_of(tmp_path), data_of(mixed)
    assert two['operands'] == one['operands']
    assert two['sketches'] == one['sketches']
    assert not list(tmp_path.glob('.*tmp'))


def test_other_settings_are_refused_or_overwritten(config: Path, fp32: Path, mixed: Path) -> None:
    with pytest.raises(ValueError, match=r"metric: 'sqnr' != 'kl'.*--overwrite"):
        run(config, fp32, mixed, '--calibrate', '--metric', 'kl')


@pytest.mark.parametrize('metric', ['kl', 'loss'])
def test_other_metrics(config: Path, fp32: Path, tmp_path: Path, metric: str) -> None:
    words = ('--metric', metric, '--kind', 'weight', '--mean-weight-bits', 3)
    data = run(config, fp32, tmp_path, '--calibrate', *words)
    increases = [operand['damage']['2'] for operand in data['operands'].values()]
    assert all(increases)  # random weights: a loss may fall as well
    assert metric == 'loss' or min(increases) > 0
    assert bool(data['sketches']) == (metric == 'kl')
    assert data['assignment']['bits']


def quantized_checkpoint(config: Path, fp32: Path, stage: str, path: Path) -> Path:
    """What a run would write: calibrated on nothing in particular."""
    model = build(Config.fromfile(config))
    load_float_(model, read_checkpoint(fp32))
    for quantizer in model.modules():
        if getattr(quantizer, 'kind', '') == 'activation':
            ones = torch.ones_like(quantizer.scale)
            quantizer.set_qparams(ones, torch.zeros_like(ones))
    checkpoint = {'state_dict': model.state_dict(), 'gplq': record(model, stage, {})}
    torch.save(checkpoint, path)
    return path


def test_uncalibrated_and_finished_checkpoints_are_refused(
    config: Path, fp32: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r'never calibrated; add --calibrate'):
        run(config, fp32, tmp_path)
    final = quantized_checkpoint(config, fp32, 'stage2', tmp_path / 'final.pth')
    with pytest.raises(ValueError, match='weights are already quantized'):
        run(config, final, tmp_path)
    checkpoint = read_checkpoint(quantized_checkpoint(config, fp32, 'stage1', tmp_path / 's.pth'))
    name = next(k for k in checkpoint['state_dict'] if k.endswith('input_quantizer.calibrated'))
    checkpoint['state_dict'][name] = torch.tensor(False)
    torch.save(checkpoint, tmp_path / 'half.pth')
    with pytest.raises(ValueError, match='1 quantizers of the checkpoint were never calibrated'):
        run(config, tmp_path / 'half.pth', tmp_path)


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (
            ('--mean-weight-bits', 1.5),
            r'1\.5 mean weight bits cannot be met.*from 2 mean weight bits to 4',
        ),
        (
            ('--mean-activation-bits', 9),
            r'9 mean activation bits cannot be met.*from 2 mean activation bits',
        ),
        (('--bops', 'w9a9'), 'write billions of bit operations'),
        (('--bops', 'w3a3', '--mean-weight-bits', 3), 'give --bops or mean bits, not both'),
        (('--kind', 'weight', '--mean-activation-bits', 3), 'add --kind activation'),
        (('--kind',), 'write one or both'),
        (('--metric', 'mse'), "metric='mse' is unknown"),
        (('--batch-size', 0), 'write a positive integer'),
        (('--out', 'x.py'), '--out needs a budget'),
        (('--mean-weight-bits', 3, '--out', 'x.json'), r'FILE\.py'),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(
    config: Path,
    fp32: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.setattr(
        measured_sensitivity.SensitivityRun, 'measure', lambda self: pytest.fail('measured')
    )
    with pytest.raises(ValueError, match=message):
        run(config, fp32, tmp_path, '--calibrate', *words)


def test_no_candidate_bits_are_refused(config: Path, fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='no candidate bits'):
        run(config, fp32, tmp_path, '--calibrate', '--bits')


def mixed_weights(config: Path, rule: dict[str, Any]) -> Config:
    """The config with one more rule."""
    cfg = Config.fromfile(config)
    cfg.model.recipe.rules = [rule]
    return cfg


def test_one_stage_1_checkpoint_serves_other_weight_bits(
    config: Path, fp32: Path, tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(quantized_checkpoint(config, fp32, 'stage1', tmp_path / 's.pth'))
    name = 'backbone.layers.0.attn.qkv'
    model = build(mixed_weights(config, dict(name=name, weight=dict(num_bits=3))))
    check_quantized(model, checkpoint)
    model.load_state_dict(checkpoint['state_dict'])
    quantizer = model.get_submodule(f'{name}.weight_quantizer')
    assert quantizer.quant_range.tolist() == [-4, 3]
    run_stage2(model, model.gplq.recipe)
    assert quantizer.codes(model.get_submodule(name).weight)[0].unique().numel() <= 8
    other = build(mixed_weights(config, dict(name=name, num_bits=3)))
    with pytest.raises(ValueError, match='another recipe'):
        check_quantized(other, checkpoint)
    checkpoint['gplq']['stage'] = 'stage2'
    with pytest.raises(ValueError, match='another recipe'):
        check_quantized(model, checkpoint)


def test_page_is_whole_and_self_contained(mixed: Path) -> None:
    page, data = read_page(mixed / 'sensitivity.html'), data_of(mixed)
    assert page.open == []
    assert page.loads == []
    errors, bits = page.specs[::2], page.specs[1::2]
    assert len(errors) == len(bits) == 2
    points = sum(len(spec['data']['values']) for spec in errors)
    assert points == 3 * len(data['operands'])
    assigned = [row['y'] for spec in bits for row in spec['data']['values']]
    assert sorted(assigned) == sorted(data['assignment']['bits'][k] for k in data['operands'])
