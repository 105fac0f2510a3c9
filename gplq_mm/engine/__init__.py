# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Floor 5: *when* things happen in a run."""
