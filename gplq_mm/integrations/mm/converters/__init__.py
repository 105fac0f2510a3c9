# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Other projects' checkpoints for the models of mmdet and mmpretrain."""
