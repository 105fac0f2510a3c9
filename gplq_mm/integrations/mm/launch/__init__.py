# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What the tools share: arguments, config, checks before long work, processes."""
