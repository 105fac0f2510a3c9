# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Rules for the tests themselves: each asserts something, each module says where it is tested."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / 'gplq_mm'

ASSERTING_CALLS = ('raises', 'warns', 'fail')
"""Functions of pytest that make a test fail."""
ASSERTING_PREFIX = 'assert_'
"""Begin of the names of helpers, and of functions of NumPy, torch and mocks, that assert."""

TESTED_IN = {
    'adapters/mmpretrain/attention': 'test_adapters/test_mmpretrain.py',
    'adapters/mmpretrain/bias_attention': 'test_adapters/test_mmpretrain.py',
    'adapters/mmpretrain/davit': 'test_adapters/test_mmpretrain.py',
    'adapters/mmpretrain/edgenext': 'test_adapters/test_mmpretrain.py',
    'adapters/mmpretrain/heads': 'test_adapters/test_mmpretrain.py',
    'adapters/mmpretrain/mixmim': 'test_adapters/test_mmpretrain.py',
    'adapters/mmpretrain/mvit': 'test_adapters/test_mmpretrain.py',
    'adapters/mmpretrain/twins': 'test_adapters/test_mmpretrain.py',
    'adapters/mmpretrain/vit_sam': 'test_adapters/test_mmpretrain.py',
    'adapters/mmpretrain/window': 'test_adapters/test_mmpretrain.py',
    'adapters/mmpretrain/xcit': 'test_adapters/test_mmpretrain.py',
    'adapters/timm/attention': 'test_adapters/test_timm_torchvision.py',
    'adapters/timm/heads': 'test_adapters/test_timm_torchvision.py',
    'adapters/timm/window': 'test_adapters/test_timm_torchvision.py',
    'adapters/torchvision': 'test_adapters/test_timm_torchvision.py',
    'adapters/vitdet_checkpoint': 'test_models/test_vitdet_converter.py',
    'algorithms/bit_search': 'test_algorithms/test_bit_assignment.py',
    'algorithms/blocks': 'test_algorithms/test_compensation.py',
    'algorithms/distributed': 'test_algorithms/test_calibration.py',
    'algorithms/float_weights': 'test_algorithms/test_folded_corrections.py',
    'algorithms/output_metrics': 'test_algorithms/test_sensitivity.py',
    'algorithms/passes': 'test_algorithms/test_calibration.py',
    'algorithms/preparation': 'test_api/test_against_mmengine.py',
    'algorithms/qwt': 'test_algorithms/test_compensation.py',
    'algorithms/stage1_optimizer': 'test_engine/test_optim.py',
    'algorithms/stage2_recipe': 'test_algorithms/test_stage2.py',
    'algorithms/streaming/calls': 'test_algorithms/test_streaming.py',
    'algorithms/streaming/interception': 'test_algorithms/test_streaming.py',
    'algorithms/streaming/sampling': 'test_algorithms/test_brecq.py',
    'algorithms/streaming/stream': 'test_algorithms/test_streaming.py',
    'algorithms/streaming/units': 'test_algorithms/test_streaming.py',
    'algorithms/weight_error': 'test_algorithms/test_stage2.py',
    'algorithms/weight_ptq/adaround': 'test_algorithms/test_brecq.py',
    'algorithms/weight_ptq/base': 'test_algorithms/test_weight_ptq.py',
    'algorithms/weight_ptq/bias_correction': 'test_algorithms/test_folded_corrections.py',
    'algorithms/weight_ptq/feature_source': 'test_adapters/test_units.py',
    'algorithms/weight_ptq/finished': 'test_algorithms/test_brecq.py',
    'algorithms/weight_ptq/frozen_suffix': 'test_algorithms/test_brecq.py',
    'algorithms/weight_ptq/global_reconstruction': 'test_adapters/test_units.py',
    'algorithms/weight_ptq/guidance': 'test_algorithms/test_gptq.py',
    'algorithms/weight_ptq/hessian': 'test_algorithms/test_gptq.py',
    'algorithms/weight_ptq/labels': 'test_tools/test_ptq_args.py',
    'algorithms/weight_ptq/layout': 'test_algorithms/test_gptq.py',
    'algorithms/weight_ptq/minmax': 'test_algorithms/test_weight_ptq.py',
    'algorithms/weight_ptq/mse': 'test_algorithms/test_weight_ptq.py',
    'algorithms/weight_ptq/outputs': 'test_algorithms/test_folded_corrections.py',
    'algorithms/weight_ptq/percentile': 'test_algorithms/test_weight_ptq.py',
    'algorithms/weight_ptq/qwt_branch': 'test_algorithms/test_folded_corrections.py',
    'algorithms/weight_ptq/qwt_v2': 'test_algorithms/test_folded_corrections.py',
    'algorithms/weight_ptq/ranges': 'test_algorithms/test_gptq.py',
    'algorithms/weight_ptq/registry': 'test_algorithms/test_weight_ptq.py',
    'algorithms/weight_ptq/repq': 'test_algorithms/test_folded_corrections.py',
    'algorithms/weight_ptq/single_layer': 'test_algorithms/test_sensitivity.py',
    'algorithms/weight_ptq/soft_rounding': 'test_algorithms/test_brecq.py',
    'algorithms/weight_ptq/stage1_target': 'test_algorithms/test_gptq.py',
    'algorithms/weight_ptq/unit_ptq': 'test_algorithms/test_brecq.py',
    'algorithms/weight_ptq/wanted_features': 'test_algorithms/test_brecq.py',
    'api/calibration': 'test_api/test_steps.py',
    'api/checkpoint': 'test_api/test_steps.py',
    'api/conversion': 'test_api/test_steps.py',
    'api/inputs': 'test_api/test_steps.py',
    'api/model_state': 'test_api/test_steps.py',
    'api/stage1': 'test_api/test_steps.py',
    'api/stage2': 'test_api/test_steps.py',
    'cli/gplq_config': 'test_cli/test_init.py',
    'doctor': 'test_cli/test_doctor.py',
    'engine/amp': 'test_engine/test_knobs.py',
    'engine/cpu_launch': 'test_engine/test_distributed.py',
    'engine/linear_probe': 'test_engine/test_transfer.py',
    'engine/loops/resumable_loop': 'test_engine/test_end_to_end.py',
    'engine/mixed_recipe': 'test_engine/test_mixed_precision.py',
    'engine/model_outputs': 'test_engine/test_mixed_precision.py',
    'engine/output_probe': 'test_engine/test_ptq_comparison.py',
    'engine/quantized_model': 'test_engine/test_transfer.py',
    'engine/sensitivity': 'test_engine/test_mixed_precision.py',
    'evaluation/sensitivity_page': 'test_engine/test_mixed_precision.py',
    'losses/distillation': 'test_losses/test_losses.py',
    'losses/feature': 'test_losses/test_losses.py',
    'losses/pca': 'test_losses/test_losses.py',
    'models/mimic_terms': 'test_models/test_mimicking.py',
    'models/necks/layer_norm_2d': 'test_models/test_simple_feature_pyramid.py',
    'modules/backends/packed/autocast': 'test_modules/test_packed_attention.py',
    'modules/float_matmul': 'test_modules/test_window_attention.py',
    'quantizers/first_order': 'test_quantizers/test_packed_codes.py',
    'quantizers/packed_passes': 'test_quantizers/test_packed_codes.py',
    'quantizers/quantizer_state': 'test_quantizers/test_fake_quantizer.py',
    'recipe/check': 'test_recipe/test_fuzz.py',
    'recipe/mimic': 'test_recipe/test_resolve.py',
    'recipe/operands': 'test_recipe/test_resolve.py',
    'recipe/recipe': 'test_recipe/test_resolve.py',
    'recipe/run_settings': 'test_recipe/test_resolve.py',
    'recipe/section': 'test_recipe/test_resolve.py',
    'registry': 'test_models/test_gplq.py',
    'utils/checkpoint_file': 'test_utils/test_checkpoint_io.py',
    'utils/patch_merging': 'test_adapters/test_swin_checkpoint.py',
    'version': 'test_packaging.py',
}
"""Test file of each module that has none of its own name."""


def modules() -> list[str]:
    """Modules of the package, as paths without suffix; packages' ``__init__`` are left out."""
    files = (path.relative_to(PACKAGE) for path in PACKAGE.rglob('*.py'))
    visible = (path for path in files if not any(part.startswith('.') for part in path.parts))
    names = sorted(str(path.with_suffix('')) for path in visible if path.name != '__init__.py')
    return [name for name in names if name != '__main__']  # its test is test_main.py


def mirrored(module: str) -> Path | None:
    """The test file with a module's name below the tests of its room; None if there is none."""
    room, _, rest = module.rpartition('/')[0].partition('/')
    name = f'test_{module.rpartition("/")[2]}.py'
    folder = TESTS / f'test_{room}' if room else TESTS
    nested = folder.joinpath(*(f'test_{part}' for part in rest.split('/') if part))
    return next((path for path in (nested / name, folder / name) if path.is_file()), None)


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Test functions of a file and of its test classes."""
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name.startswith('Test')]
    for body in (tree.body, *(node.body for node in classes)):
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith('test_'):
                yield node


def asserts(function: ast.FunctionDef, helpers: Collection[str] = ()) -> bool:
    """Whether a function has an assertion, or calls a function that asserts.

    Args:
        function: A test, or a helper.
        helpers: Names of functions of the same file that assert.
    """
    for node in ast.walk(function):
        if isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant):
            return True
        if isinstance(node, ast.Call):
            name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
            if name in (*ASSERTING_CALLS, *helpers) or name.startswith(ASSERTING_PREFIX):
                return True
    return False


def without_assertion(text: str) -> list[str]:
    """Names of a file's tests that assert nothing."""
    tree = ast.parse(text)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    helpers = {f.name for f in functions if f.name.startswith('check') and asserts(f)}
    return [test.name for test in functions_of(tree) if not asserts(test, helpers)]


def test_every_test_asserts_something() -> None:
    empty = []
    for path in sorted(TESTS.rglob('test_*.py')):
        names = without_assertion(path.read_text(encoding='utf-8'))
        empty += [f'{path.relative_to(TESTS)}: {name}' for name in names]
    policy = (
        'A test asserts what it expects: assert, pytest.raises, a function named '
        f'{ASSERTING_PREFIX}*, or a function check* of the same file that asserts.'
    )
    assert not empty, '\n'.join([policy, *empty])


@pytest.mark.parametrize(
    ('body', 'expected'),
    [
        ('assert x == 1', True),
        ('with pytest.raises(ValueError): run()', True),
        ('mock.assert_called_once()', True),
        ('check(x)', True),
        ('check_state_dict(x, y)', False),
        ('run()', False),
        ('assert True', False),
    ],
)
def test_asserts_tells_good_from_bad(body: str, expected: bool) -> None:
    helper = 'def check(x):\n    assert x\n'
    assert (without_assertion(f'{helper}def test_x():\n    {body}\n') == []) is expected


@pytest.mark.parametrize('module', modules())
def test_a_module_says_where_it_is_tested(module: str) -> None:
    if mirrored(module) is None:
        name = module.rpartition('/')[2]
        assert module in TESTED_IN, f'write test_{name}.py, or add gplq_mm/{module}.py to TESTED_IN'
        assert (TESTS / TESTED_IN[module]).is_file(), TESTED_IN[module]
    else:
        assert module not in TESTED_IN, f'{mirrored(module)} exists: remove it from TESTED_IN'


def test_the_table_names_modules_only() -> None:
    assert not TESTED_IN.keys() - set(modules())
    assert list(TESTED_IN) == sorted(TESTED_IN)
