# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""`python -m gplq_mm report`: write the HTML report of a run anew, or compare runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..pages.comparison_page import write_comparison
from ..pages.run_files import find_report
from ..pages.run_page import write_run_page

COMPARISON_NAME = 'gplq_comparison.html'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `report`.

    Args:
        parser: Parser of this sub-command.
    """
    parser.add_argument(
        'work_dirs',
        nargs='+',
        type=Path,
        metavar='WORK_DIR',
        help='work dir of a run, or its JSON report; several are compared',
    )
    parser.add_argument(
        '-o',
        '--out',
        type=Path,
        help=f'file to write: gplq_report.html in the work dir, {COMPARISON_NAME} of several runs',
    )


def run(args: argparse.Namespace) -> int:
    """Write the page.

    Args:
        args: Parsed command line.

    Returns:
        0.

    Raises:
        FileNotFoundError: If a work dir has no report.
        ValueError: If a report is none of a run, OUT is no HTML file, or a package is missing.
    """
    if args.out is not None and args.out.suffix not in ('.html', '.htm'):
        raise ValueError(f'-o {args.out}: a page is an HTML file, write -o {args.out}.html')
    reports = [find_report(place) for place in args.work_dirs]
    if len(reports) == 1:
        path = write_run_page(reports[0], out=args.out)
    else:
        path = write_comparison(reports, args.out or Path(COMPARISON_NAME))
    sys.stdout.write(f'wrote {path}\n')
    return 0
