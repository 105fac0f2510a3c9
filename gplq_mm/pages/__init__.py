# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Self-contained HTML pages: the report of a run, runs compared, sensitivities."""
