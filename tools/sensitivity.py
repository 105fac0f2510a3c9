# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Measure how much few bits increase the error of each layer, and assign bits under a budget.

Examples:
    python tools/sensitivity.py CONFIG work_dirs/x/gplq_stage1.pth --kind weight \
        --mean-weight-bits 3
    python tools/sensitivity.py CONFIG fp32.pth --calibrate --metric kl --bops w3a3
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log

from gplq_mm.analysis.operands import KINDS
from gplq_mm.analysis.sensitivity_table import comparison_table, worst_table
from gplq_mm.integrations.mm.launch.errors import ConfigError
from gplq_mm.integrations.mm.launch.preflight import check_checkpoint, check_data
from gplq_mm.integrations.mm.launch.settings_check import is_gplq
from gplq_mm.integrations.mm.launch.tools import add_arguments, build_runner, read_config, run_tool
from gplq_mm.integrations.mm.studies import mixed_recipe
from gplq_mm.integrations.mm.studies.measured_sensitivity import (
    SensitivityOptions,
    SensitivityRun,
    prepare,
)
from gplq_mm.integrations.mm.studies.mixed_recipe import Budget
from gplq_mm.pages.rendering import write_page
from gplq_mm.pages.sensitivity_page import sensitivity_page
from gplq_mm.pages.vega import MissingPackagesError

PAGE_NAME = 'sensitivity.html'
RECIPE_NAME = 'mixed_recipe.py'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Sensitivity and mixed precision')
    add_arguments(parser)
    parser.add_argument(
        'checkpoint', help='gplq_stage1.pth or gplq_calibrated.pth; FP32 with --calibrate'
    )
    parser.add_argument('--metric', default='sqnr', help='sqnr (default), kl or loss')
    parser.add_argument(
        '--bits', nargs='*', type=int, default=[2, 3, 4, 8], help='candidate bits, 2 to 8'
    )
    parser.add_argument(
        '--kind',
        nargs='*',
        default=list(KINDS),
        help='weight, activation or both (default); weight alone after stage 1',
    )
    parser.add_argument('--num-images', type=int, help="images; the recipe's calibration number")
    parser.add_argument('--batch-size', type=int, help='images per forward pass')
    parser.add_argument('--seed', type=int, default=0, help='seed of the choice of images')
    parser.add_argument(
        '--include-pinned',
        action='store_true',
        help="also measure and assign operands whose bits a rule sets, e.g. the presets' 8-bit "
        'first and last layer',
    )
    parser.add_argument('--calibrate', action='store_true', help='calibrate a float checkpoint')
    parser.add_argument(
        '--overwrite', action='store_true', help='replace a measurement with other settings'
    )
    budget = parser.add_argument_group('budget of an assignment (none: measure only)')
    for kind, over in (('weight', 'all weights'), ('activation', "one image's activations")):
        about = f'mean over {over}, e.g. 3'
        budget.add_argument(f'--mean-{kind}-bits', type=float, metavar='BITS', help=about)
    budget.add_argument('--bops', metavar='G', help='billions per image, or those of e.g. w3a3')
    budget.add_argument('--out', metavar='FILE.py', help=f'config; {RECIPE_NAME} in the work dir')
    return parser.parse_args(argv)


def options_of(args: argparse.Namespace) -> SensitivityOptions:
    """The measurement that the command line describes."""
    for name in ('num_images', 'batch_size'):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f'--{name.replace("_", "-")} {value}: write a positive integer')
    return SensitivityOptions(
        args.metric,
        args.bits,
        args.kind,
        args.num_images,
        args.batch_size,
        args.seed,
        args.include_pinned,
        args.calibrate,
        args.overwrite,
    )


def check(cfg: Config, args: argparse.Namespace) -> None:
    """Check the arguments before the long start-up.

    Raises:
        ConfigError: If the config is no GPLQ config, ``--out`` is no Python file or has
            no budget, or the checkpoint or the data does not exist.
    """
    if not is_gplq(cfg):
        raise ConfigError(
            f'{args.config} has no model of type gplq_mm.GPLQ; write a GPLQ config with '
            'python -m gplq_mm init'
        )
    if args.out and not args.out.endswith('.py'):
        raise ConfigError(f'--out {args.out}: the assignment is written as a config, FILE.py')
    if args.out and not budget_of(args):
        raise ConfigError('--out needs a budget; add --mean-weight-bits 3, or --bops w3a3')
    check_checkpoint(args.checkpoint)
    check_data(cfg, ('train', 'val'))


def budget_of(args: argparse.Namespace) -> Budget:
    """The budget on the command line."""
    return Budget(args.mean_weight_bits, args.mean_activation_bits, args.bops)


def without_mimicking(cfg: Config) -> None:
    """Build the model without stage 1's teacher: the loss here is the task loss only."""
    recipe = cfg.model.get('recipe', 'w4a4')
    cfg.model.recipe = {**({'base': recipe} if isinstance(recipe, str) else recipe), 'mimic': None}


def finish(run: SensitivityRun, args: argparse.Namespace, recipe: object) -> None:
    """Print the tables; write the page and, under a budget, the assignment and its config."""
    log(f'the most sensitive operands:\n{worst_table(run.data)}')
    budget, bits, rows = budget_of(args), None, []
    if budget:
        bits = mixed_recipe.assign(run, budget)
        rows = mixed_recipe.compare(run, bits, budget)
        log(f'bits under {budget}:\n{comparison_table(rows, run.data["unit"])}')
        run.data['assignment'] = {'budget': str(budget), 'bits': bits, 'settings': rows}
        run.write()
    if is_main_process():
        log(f'wrote {run.path}')
        try:
            page = run.path.with_name(PAGE_NAME)
            write_page(page, sensitivity_page(run.data, bits, rows, str(budget)))
            log(f'wrote {page}')
        except MissingPackagesError as error:
            log(f'no {PAGE_NAME}: {error}')
        if bits is not None:
            out = Path(args.out) if args.out else run.path.with_name(RECIPE_NAME)
            mixed = mixed_recipe.mixed_recipe(recipe, run, bits)
            origin = mixed_recipe.describe_origin(run, budget)
            mixed_recipe.write_config(out, args.config, mixed, origin)
            log(f'wrote {out}: {len(mixed["rules"])} rules; a config to train or quantize with')
    barrier()


def log(text: str) -> None:
    print_log(text, logger='current')


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    options, budget = options_of(args), budget_of(args)
    cfg = read_config(args, splits=())
    check(cfg, args)
    recipe = cfg.model.get('recipe', 'w4a4')
    cfg.load_from, cfg.resume = None, False
    without_mimicking(cfg)
    run = prepare(build_runner(cfg), args.checkpoint, options)
    if budget:
        mixed_recipe.check(run, budget)
    run.measure()
    finish(run, args, recipe)


if __name__ == '__main__':
    sys.exit(run_tool(main))
