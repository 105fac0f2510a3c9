# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Several processes without an accelerator; MMEngine's own launch requires one."""

import torch.distributed as dist
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device


def prepare_cpu_launch(cfg: Config) -> None:
    """Let ``--launcher pytorch`` work on CPU; does nothing otherwise.

    MMEngine calls ``torch.cuda.set_device`` unless a process group exists already,
    and gives DDP device ids, which DDP refuses for a model on the CPU.

    Args:
        cfg: Config with its ``launcher``; gets a ``model_wrapper_cfg`` if it has none.
    """
    if cfg.get('launcher', 'none') != 'pytorch' or get_device() != 'cpu':
        return
    if not dist.is_initialized():
        dist.init_process_group('gloo')
    if not cfg.get('model_wrapper_cfg'):
        cfg.model_wrapper_cfg = ConfigDict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
