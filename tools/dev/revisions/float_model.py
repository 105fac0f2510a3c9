# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Train a config's float model for an epoch; both revisions start from its `float.pth`."""

import shutil
import sys

from mmengine.config import Config
from mmengine.runner import Runner

if __name__ == '__main__':
    cfg = Config.fromfile(sys.argv[1])
    cfg.work_dir = 'float'
    Runner.from_cfg(cfg).train()
    shutil.copy('float/epoch_1.pth', 'float.pth')
