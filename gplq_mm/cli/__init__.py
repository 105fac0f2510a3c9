# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Sub-commands of `python -m gplq_mm`: one file each, with `add_arguments` and `run`."""
