# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The accuracy benchmark: recipes, rows, resume; rows run on a tiny project."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('mmpretrain')

from gplq_mm.integrations.mm.launch.errors import ConfigError
from gplq_mm.recipe import auto_settings, resolve_recipe, settle_auto
from tests.helpers.runners import save_float
from tests.helpers.tiny_projects import REPOSITORY, TinyProject, make_project

KEYS = ('model', 'dataset', 'recipe', 'bits', 'seed')
FIGURES = ('fp32', 'stage1', 'stage2', 'seconds', 'peak_memory_bytes')


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / 'tools/benchmarks'))


def tool(name: str) -> Any:
    return import_module(name)


def parse(text: str) -> Any:
    return tool('accuracy_recipes').parse_recipe(text)


def test_every_known_recipe_resolves_at_all_bits() -> None:
    recipes = tool('accuracy_recipes')
    for recipe in recipes.RECIPES.values():
        for bits in ('w4a4', 'w3a3', 'w2a4', 'w2a2'):
            found = recipe.resolve(bits, 128)
            assert (found['weight']['num_bits'], found['activation']['num_bits']) == (
                recipes.parse_bits(bits)
            )
    assert set(recipes.DEFAULT) == {'rtn', 'direct', 'paper', 'ours'}


def test_the_recipes_are_what_their_names_say() -> None:
    ours = parse('ours').resolve('w3a3', 128)
    assert {**ours, 'name': 'w3a3'} == resolve_recipe('w3a3')
    paper = parse('paper')
    assert paper.schedule == 'constant'
    found = paper.resolve('w4a4', 128)
    assert {**found, 'name': 'gplq_w4a4_paper'} == resolve_recipe('gplq_w4a4_paper')
    assert [paper.resolve('w4a4', b)['optim']['lr'] for b in (256, 64, 16)] == [5e-6, 2.5e-6, 1e-6]
    assert parse('rtn').epochs == 0
    direct = parse('direct').resolve('w4a4', 128)['weight']
    assert direct['qat']
    assert direct['learn_scale']


def test_a_variant_overrides_its_base() -> None:
    text = 'kd=base:w3a3,optim.lr=1e-4,mimic.type=logits,schedule=constant,epochs=2,cfg.x=[1,2]'
    recipe = parse(text)
    assert (recipe.name, recipe.bits, recipe.schedule, recipe.epochs) == (
        'kd', 'w3a3', 'constant', 2,
    )  # fmt: skip
    assert recipe.options == {'x': [1, 2]}
    found = recipe.resolve('w3a3', 128)
    assert (found['optim']['lr'], found['mimic']['type']) == (1e-4, 'logits')
    assert found['optim']['scale_lr'] == resolve_recipe('w3a3')['optim']['scale_lr']
    assert parse('x=paper,mimic=None').resolve('w4a4', 128)['mimic'] is None
    assert parse('ours').overrides == {}


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('outs', "'outs' is unknown"),
        ('x=outs:w4a4', "'outs' is unknown"),
        ('x=ours:w4', "bits 'w4': write wXaY"),
        ('x=ours,lr', "'lr' is no key=value"),
        ('x=ours,schedule=step', "schedule='step'"),
    ],
)
def test_a_variant_that_means_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_a_fingerprint_stands_for_what_a_recipe_means(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = tool('accuracy_recipes')

    def meant(text: str, is_detector: bool = False) -> str:
        resolved = parse(text).resolve('w4a4', 128)
        return recipes.fingerprint(recipes.settled(resolved, is_detector))

    numbers = settle_auto('w4a4', is_detector=False).optim.as_dict()
    keys = ('lr', 'lr_iterations', 'scale_lr', 'betas')
    written = ','.join(f'optim.{key}={numbers[key]}' for key in keys)
    ours = meant('ours')
    assert meant(f'x=ours,{written}') == ours
    assert len({ours, meant('ours', is_detector=True), meant('x=ours,optim.lr=1e-9')}) == 3
    assert meant('x=ours,mimic.task_weight=1.0') == ours != meant('x=ours,mimic.task_weight=0.5')
    changed = {**auto_settings._CLASSIFIER, ('optim', 'lr'): 1e-9}
    monkeypatch.setattr(auto_settings, '_CLASSIFIER', changed)
    assert meant('ours') != ours


def test_stage_1_does_not_depend_on_what_stage_2_does() -> None:
    recipes = tool('accuracy_recipes')

    def part(resolved: dict[str, Any]) -> dict[str, Any]:
        return recipes.stage1_part(recipes.settled(resolved, is_detector=False))

    w4, w2, w3 = (part(parse('ours').resolve(b, 128)) for b in ('w4a4', 'w2a4', 'w3a3'))
    assert w4 == w2 != w3
    gptq = part(parse('x=ours,weight.ptq=minmax,stage2.compensation=qwt').resolve('w4a4', 128))
    assert gptq == w4
    direct = [part(parse('direct').resolve(b, 128)) for b in ('w4a4', 'w2a4')]
    assert direct[0] != direct[1]


def stored(**keys: Any) -> dict[str, Any]:
    row = dict(model='m', dataset='d', recipe='ours', bits='w4a4', seed=0)
    figures = dict(fp32=70.0, stage1=69.0, stage2=68.0, seconds=10.0, peak_memory_bytes=2**30)
    return {**row, **figures, **keys}


def test_the_table_averages_over_seeds(tmp_path: Path) -> None:
    table = tool('accuracy_table')
    rows = [stored(), stored(seed=1, stage2=69.0), stored(recipe='rtn', bits='w3a3')]
    table.write_rows(tmp_path / 'a' / 'rows.json', rows)
    assert table.read_rows(tmp_path / 'a' / 'rows.json') == sorted(rows, key=table.row_key)
    assert [p.name for p in (tmp_path / 'a').iterdir()] == ['rows.json']
    lines = table.table(rows).splitlines()
    assert lines[0] == 'm, d'
    cells = [[c.strip() for c in line.strip('|').split('|')] for line in lines[3:]]
    assert cells[0] == [
        'ours', 'W4A4', '2', '70.00', '69.00', '68.50 ± 0.71', '1.50 ± 0.71', 'cpu', '10', '1024',
    ]  # fmt: skip
    assert cells[1][:3] == ['rtn', 'W3A3', '1']
    assert table.table([]) == 'no rows'
    mixed = table.table([stored(), stored(seed=1, device='X200')]).splitlines()[3]
    assert [c.strip() for c in mixed.strip('|').split('|')][7:] == ['X200, cpu', '-', '-']


@pytest.fixture(scope='module')
def project(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    project = make_project(tmp_path_factory.mktemp('accuracy'), 'vit_classifier')
    save_float(project, project.config.with_suffix('.pth'))
    return project


def arguments(project: TinyProject, folder: Path, *words: str) -> Any:
    data = project.root / 'data/shapes_folder'
    common = ('--models', str(project.config), '--data-root', str(data), '--out')
    places = (str(folder / 'rows.json'), '--work-dir', str(folder / 'work'))
    return tool('accuracy').parse_args([*common, *places, *words])


def fake(result: dict[str, Any], calls: list[Any]) -> Any:
    def process(row: Any, job: dict[str, Any]) -> dict[str, Any] | None:
        calls.append((str(row), job['evaluate_fp32'], job['stage1_dir']))
        if job['seed'] == 13:
            return None
        fp32 = 90.0 if job['evaluate_fp32'] else None
        return {**result, 'fp32': fp32, 'stage1_key': row.stage1_key}

    return process


RESULT = dict(stage1=89.0, stage2=88.0, seconds=1.0, peak_memory_bytes=1, metric='x')


def test_a_killed_run_goes_on_with_the_missing_rows(project: TinyProject, tmp_path: Path) -> None:
    accuracy = tool('accuracy')
    words = ('--recipes', 'rtn', 'ours', '--bits', 'w4a4', 'w2a4', '--seeds', '0', '13')
    args = arguments(project, tmp_path, *words)
    planned = accuracy.plan(args)
    assert len(planned) == 8
    calls: list[Any] = []
    benchmark = accuracy.Benchmark(args, [])
    benchmark._process = fake(RESULT, calls)
    benchmark.run(planned)
    assert sum(fp32 for _, fp32, _ in calls) == 1
    rows = tool('accuracy_table').read_rows(args.out)
    assert len(rows) == 4
    assert all(list(row)[:10] == [*KEYS, *FIGURES] for row in rows)
    assert {row['fp32'] for row in rows} == {90.0}
    old = [{**row, 'checkpoint_sha256': 'of another checkpoint'} for row in rows]
    assert accuracy.Benchmark(args, old)._fp32(planned[0]) is None
    assert [stage1 is not None for name, _, stage1 in calls if name.endswith('w2a4 0')] == [
        True
    ] * 2
    again = accuracy.Benchmark(args, rows)
    assert {row.key['seed'] for row in again.missing(planned)} == {13}
    changed = arguments(project, tmp_path, '--recipes', 'rtn', 'ours=ours,optim.lr=1.0')
    assert [row.key['recipe'] for row in again.missing(accuracy.plan(changed))] == ['ours']


def test_what_differs_from_the_common_run_is_in_the_label(
    project: TinyProject, tmp_path: Path
) -> None:
    words = ('--recipes', 'ours', 'rtn', '--epochs', '2', '--train-fraction', '0.1', '--amp')
    labels = [r.key['recipe'] for r in tool('accuracy').plan(arguments(project, tmp_path, *words))]
    assert labels == ['ours@10%@2ep@bf16', 'rtn@10%']


def run_row(row: Any, monkeypatch: pytest.MonkeyPatch, **job: Any) -> dict[str, Any]:
    row.work_dir.mkdir(parents=True)
    path = row.work_dir / 'job.json'
    path.write_text(json.dumps({**row.job, 'evaluate_fp32': True, 'stage1_dir': None, **job}))
    monkeypatch.setattr(sys, 'argv', ['accuracy_row.py', str(path)])
    tool('accuracy_row').main()
    return json.loads((row.work_dir / 'result.json').read_text())


def test_rows_run_by_config_and_share_a_stage_1(
    project: TinyProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = 'small=ours,calibration.num_images=4'
    words = ('--recipes', small, '--bits', 'w4a4', 'w2a4', '--train-fraction', '0.5')
    first, second = tool('accuracy').plan(arguments(project, tmp_path, *words))
    assert first.stage1_key == second.stage1_key
    four = run_row(first, monkeypatch)
    two = run_row(second, monkeypatch, evaluate_fp32=False, stage1_dir=str(first.work_dir))
    assert all(0 <= four[key] <= 100 for key in ('fp32', 'stage1', 'stage2'))
    assert four['seconds'] > four['stage1_seconds'] > 0
    assert (two['fp32'], two['stage1']) == (None, four['stage1'])
    reports = [json.loads((r.work_dir / 'gplq_report.json').read_text()) for r in (first, second)]
    assert [r['recipe']['weight']['num_bits'] for r in reports] == [4, 2]
    assert reports[0]['stage1']['iterations'] == 5  # 20 of 40 images, 4 a batch
    noise = [r['stage2']['weights']['mean_sqnr_db'] for r in reports]
    assert noise[0] > noise[1] + 6
    assert not list(first.work_dir.glob('epoch_*.pth'))


def test_a_missing_model_is_named(project: TinyProject, tmp_path: Path) -> None:
    args = arguments(project, tmp_path, '--models', f'{project.config}={tmp_path / "no.pth"}')
    with pytest.raises(ConfigError, match='no.pth'):
        tool('accuracy').plan(args)
