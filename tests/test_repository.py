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
    'analysis/bit_search': 'test_analysis/test_bit_assignment.py',
    'analysis/gate/bit_steps': 'test_integrations/test_mm/test_run/test_start_check.py',
    'analysis/gate/gate_check': 'test_integrations/test_mm/test_run/test_gate.py',
    'analysis/output_metrics': 'test_analysis/test_sensitivity.py',
    'analysis/sensitivity_table': 'test_integrations/test_mm/test_mixed_precision.py',
    'api/calibrating': 'test_api/test_steps.py',
    'api/checkpoint_file': 'test_integrations/test_mm/test_checkpoints/test_checkpoint_io.py',
    'api/inputs': 'test_api/test_steps.py',
    'api/model_state': 'test_api/test_steps.py',
    'api/preparation': 'test_api/test_against_mmengine.py',
    'api/quantizing': 'test_api/test_steps.py',
    'api/saving': 'test_api/test_steps.py',
    'api/training': 'test_api/test_steps.py',
    'api/weights': 'test_api/test_steps.py',
    'calibration/float_weights': 'test_ptq/test_corrections/test_folded_corrections.py',
    'cli/gplq_config': 'test_cli/test_init.py',
    'compat/cache_folder': 'test_pages/test_vega.py',
    'distillation/losses/pca_mimic': 'test_distillation/test_losses/test_losses.py',
    'distillation/losses/relative_feature': 'test_distillation/test_losses/test_losses.py',
    'distillation/losses/soft_logits': 'test_distillation/test_losses/test_losses.py',
    'distillation/mimic_terms': 'test_distillation/test_mimicking.py',
    'distillation/optimizer_groups': 'test_integrations/test_mm/test_optim.py',
    'distillation/score_head': 'test_distillation/test_mimic_features.py',
    'doctor': 'test_cli/test_doctor.py',
    'integrations/mm/adapters/mmpretrain/attention': 'test_integrations/test_mm/test_adapters/test_mmpretrain/test_mmpretrain.py',  # noqa: E501
    'integrations/mm/adapters/mmpretrain/bias_attention': 'test_integrations/test_mm/test_adapters/test_mmpretrain/test_mmpretrain.py',  # noqa: E501
    'integrations/mm/adapters/mmpretrain/davit': 'test_integrations/test_mm/test_adapters/test_mmpretrain/test_mmpretrain.py',  # noqa: E501
    'integrations/mm/adapters/mmpretrain/edgenext': 'test_integrations/test_mm/test_adapters/test_mmpretrain/test_mmpretrain.py',  # noqa: E501
    'integrations/mm/adapters/mmpretrain/heads': 'test_integrations/test_mm/test_adapters/test_mmpretrain/test_mmpretrain.py',  # noqa: E501
    'integrations/mm/adapters/mmpretrain/mixmim': 'test_integrations/test_mm/test_adapters/test_mmpretrain/test_mmpretrain.py',  # noqa: E501
    'integrations/mm/adapters/mmpretrain/mvit': 'test_integrations/test_mm/test_adapters/test_mmpretrain/test_mmpretrain.py',  # noqa: E501
    'integrations/mm/adapters/mmpretrain/twins': 'test_integrations/test_mm/test_adapters/test_mmpretrain/test_mmpretrain.py',  # noqa: E501
    'integrations/mm/adapters/mmpretrain/vit_sam': 'test_integrations/test_mm/test_adapters/test_mmpretrain/test_mmpretrain.py',  # noqa: E501
    'integrations/mm/adapters/mmpretrain/window': 'test_integrations/test_mm/test_adapters/test_mmpretrain/test_mmpretrain.py',  # noqa: E501
    'integrations/mm/adapters/mmpretrain/xcit': 'test_integrations/test_mm/test_adapters/test_mmpretrain/test_mmpretrain.py',  # noqa: E501
    'integrations/mm/adapters/mmseg/backbones': 'test_integrations/test_mm/test_adapters/test_mmseg/test_mmseg.py',  # noqa: E501
    'integrations/mm/adapters/mmseg/decode_heads': 'test_integrations/test_mm/test_adapters/test_mmseg/test_mmseg.py',  # noqa: E501
    'integrations/mm/adapters/mmseg/self_attention': 'test_integrations/test_mm/test_adapters/test_mmseg/test_mmseg.py',  # noqa: E501
    'integrations/mm/checkpoints/quantized_model': 'test_integrations/test_mm/test_studies/test_transfer.py',  # noqa: E501
    'integrations/mm/converters/patch_merging': 'test_integrations/test_mm/test_converters/test_swin_checkpoint.py',  # noqa: E501
    'integrations/mm/converters/vitdet_checkpoint': 'test_integrations/test_mm/test_converters/test_vitdet_converter.py',  # noqa: E501
    'integrations/mm/cpu_amp': 'test_integrations/test_mm/test_knobs.py',
    'integrations/mm/data/model_outputs': 'test_integrations/test_mm/test_mixed_precision.py',
    'integrations/mm/deployment/any_size': 'test_integrations/test_mm/test_deployment/test_deployed_backbone.py',  # noqa: E501
    'integrations/mm/deployment/example_pass': 'test_cli/test_inspect.py',
    'integrations/mm/deployment/exportable': 'test_integrations/test_mm/test_deployment/test_deployed_backbone.py',  # noqa: E501
    'integrations/mm/deployment/runtime_formats': 'test_integrations/test_mm/test_deployment/test_deployed_backbone.py',  # noqa: E501
    'integrations/mm/launch/cpu_launch': 'test_integrations/test_mm/test_distributed.py',
    'integrations/mm/launch/settings_check': 'test_tools/test_bad_inputs.py',
    'integrations/mm/necks/layer_norm_2d': 'test_integrations/test_mm/test_necks/test_simple_feature_pyramid.py',  # noqa: E501
    'integrations/mm/predictions/plain_prediction': 'test_integrations/test_mm/test_predictions/test_example_search.py',  # noqa: E501
    'integrations/mm/predictions/prediction_log': 'test_integrations/test_mm/test_predictions/test_example_search.py',  # noqa: E501
    'integrations/mm/predictions/thumbnail': 'test_integrations/test_mm/test_predictions/test_example_search.py',  # noqa: E501
    'integrations/mm/resumable_loop': 'test_integrations/test_mm/test_end_to_end.py',
    'integrations/mm/roi_features': 'test_integrations/test_mm/test_adapters/test_units.py',
    'integrations/mm/run/output_probe': 'test_integrations/test_mm/test_studies/test_ptq_comparison.py',  # noqa: E501
    'integrations/mm/studies/measured_sensitivity': 'test_integrations/test_mm/test_mixed_precision.py',  # noqa: E501
    'integrations/mm/studies/mixed_recipe': 'test_integrations/test_mm/test_mixed_precision.py',
    'integrations/mm/studies/probe_model': 'test_integrations/test_mm/test_studies/test_transfer.py',  # noqa: E501
    'integrations/onnx/equality': 'test_integrations/test_onnx/test_integer_style.py',
    'integrations/onnx/graph_passes': 'test_integrations/test_onnx/test_onnx_export.py',
    'integrations/onnx/nodes': 'test_integrations/test_onnx/test_onnx_export.py',
    'integrations/onnx/packages': 'test_integrations/test_onnx/test_onnx_model.py',
    'integrations/onnx/precision': 'test_integrations/test_onnx/test_onnx_export.py',
    'integrations/onnx/torch_ops': 'test_integrations/test_onnx/test_onnx_export.py',
    'integrations/onnx/window_ops': 'test_integrations/test_mm/test_deployment/test_deployed_backbone.py',  # noqa: E501
    'integrations/openvino/fake_quantize_style': 'test_integrations/test_openvino/test_openvino_export.py',  # noqa: E501
    'integrations/openvino/openvino_model': 'test_integrations/test_openvino/test_openvino_export.py',  # noqa: E501
    'integrations/timm/attention': 'test_integrations/test_timm_torchvision.py',
    'integrations/timm/heads': 'test_integrations/test_timm_torchvision.py',
    'integrations/timm/window': 'test_integrations/test_timm_torchvision.py',
    'integrations/torchvision/transformers': 'test_integrations/test_timm_torchvision.py',
    'ops/attention/grouped': 'test_integrations/test_mm/test_adapters/test_mmpretrain/test_mmpretrain.py',  # noqa: E501
    'ops/attention/position_bias': 'test_integrations/test_mm/test_adapters/test_mmpretrain/test_mmpretrain.py',  # noqa: E501
    'ops/backends/integer/layer_weight': 'test_ops/test_backends/test_integer/test_linear.py',
    'ops/backends/packed/autocast': 'test_ops/test_backends/test_packed/test_attention.py',
    'ops/float_matmul': 'test_ops/test_attention/test_window.py',
    'pages/charts': 'test_pages/test_run_page.py',
    'pages/layer_rows': 'test_pages/test_run_page.py',
    'pages/rendering': 'test_pages/test_run_page.py',
    'pages/sensitivity_page': 'test_integrations/test_mm/test_mixed_precision.py',
    'ptq/algorithms': 'test_ptq/test_weight_ptq.py',
    'ptq/corrections/bias_correction': 'test_ptq/test_corrections/test_folded_corrections.py',
    'ptq/corrections/output_statistics': 'test_ptq/test_corrections/test_folded_corrections.py',
    'ptq/corrections/qwt': 'test_ptq/test_corrections/test_side_branch.py',
    'ptq/corrections/qwt_branch': 'test_ptq/test_corrections/test_folded_corrections.py',
    'ptq/corrections/qwt_v2': 'test_ptq/test_corrections/test_folded_corrections.py',
    'ptq/corrections/repq': 'test_ptq/test_corrections/test_folded_corrections.py',
    'ptq/labels': 'test_tools/test_ptq_args.py',
    'ptq/layer_matrix': 'test_ptq/test_rounding/test_gptq.py',
    'ptq/ranges/for_rounding': 'test_ptq/test_rounding/test_gptq.py',
    'ptq/ranges/minmax': 'test_ptq/test_weight_ptq.py',
    'ptq/ranges/mse': 'test_ptq/test_weight_ptq.py',
    'ptq/ranges/percentile': 'test_ptq/test_weight_ptq.py',
    'ptq/rounding/adaround': 'test_ptq/test_rounding/test_brecq.py',
    'ptq/rounding/feature_source': 'test_integrations/test_mm/test_model_structure.py',
    'ptq/rounding/frozen_suffix': 'test_ptq/test_rounding/test_brecq.py',
    'ptq/rounding/global_reconstruction': 'test_integrations/test_mm/test_adapters/test_units.py',
    'ptq/rounding/guidance': 'test_ptq/test_rounding/test_gptq.py',
    'ptq/rounding/hessian': 'test_ptq/test_rounding/test_gptq.py',
    'ptq/rounding/soft_rounding': 'test_ptq/test_rounding/test_brecq.py',
    'ptq/rounding/stage1_target': 'test_ptq/test_rounding/test_gptq.py',
    'ptq/rounding/target_features': 'test_ptq/test_rounding/test_brecq.py',
    'ptq/single_layer': 'test_analysis/test_sensitivity.py',
    'ptq/stage2_recipe': 'test_ptq/test_stage2.py',
    'ptq/task': 'test_ptq/test_weight_ptq.py',
    'ptq/unit_ptq': 'test_ptq/test_rounding/test_brecq.py',
    'ptq/weight_error': 'test_ptq/test_stage2.py',
    'quantizers/first_order': 'test_quantizers/test_packing/test_codes.py',
    'quantizers/packing/torch_passes': 'test_quantizers/test_packing/test_codes.py',
    'quantizers/quantizer_state': 'test_quantizers/test_fake_quantizer.py',
    'recipe/check': 'test_recipe/test_fuzz.py',
    'recipe/recipe': 'test_recipe/test_resolve.py',
    'recipe/sections/mimic': 'test_recipe/test_resolve.py',
    'recipe/sections/operand_settings': 'test_recipe/test_resolve.py',
    'recipe/sections/run_settings': 'test_recipe/test_resolve.py',
    'recipe/sections/section': 'test_recipe/test_resolve.py',
    'registry': 'test_integrations/test_mm/test_builder.py',
    'stream/blocks': 'test_ptq/test_corrections/test_side_branch.py',
    'stream/calls': 'test_stream/test_stream.py',
    'stream/distributed': 'test_calibration/test_activation_ranges.py',
    'stream/interception': 'test_stream/test_stream.py',
    'stream/passes': 'test_calibration/test_activation_ranges.py',
    'stream/sampling': 'test_ptq/test_rounding/test_brecq.py',
    'stream/unit_stream': 'test_stream/test_stream.py',
    'stream/units': 'test_stream/test_stream.py',
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
