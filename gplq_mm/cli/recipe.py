# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""`python -m gplq_mm recipe`: print a preset with a comment for each key, or a JSON schema."""

from __future__ import annotations

import argparse
import json
import sys

from gplq_mm.recipe import PRESETS, as_recipe
from gplq_mm.recipe.schema import recipe_schema
from gplq_mm.recipe.text import STYLES, recipe_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `recipe`.

    Args:
        parser: Parser of this sub-command.
    """
    names = ', '.join(sorted(PRESETS))
    parser.add_argument('name', nargs='?', default='w4a4', help=f'preset, one of {names}')
    parser.add_argument(
        '--format',
        choices=sorted(STYLES),
        default='yaml',
        help='yaml, or python to paste into a config',
    )
    parser.add_argument(
        '--json-schema', action='store_true', help='print the schema of all recipes, for editors'
    )


def run(args: argparse.Namespace) -> int:
    """Print the preset or the schema.

    Args:
        args: Parsed command line.

    Returns:
        0.

    Raises:
        ValueError: If no preset has the name.
    """
    if args.json_schema:
        sys.stdout.write(json.dumps(recipe_schema(), indent=2) + '\n')
    else:
        sys.stdout.write(recipe_text(as_recipe(args.name), args.format))
    return 0
