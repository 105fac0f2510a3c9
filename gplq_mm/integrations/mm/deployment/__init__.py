# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""MM models in other runtimes: the parts that are exported, and a backbone that runs such a file."""
