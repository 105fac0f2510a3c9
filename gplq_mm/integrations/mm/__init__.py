# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""MMEngine, mmcv, mmdet and mmpretrain."""
