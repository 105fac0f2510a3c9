# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Handlers of the classes of mmcv, mmdet and mmpretrain: one folder per library."""
