# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A run that keeps one checkpoint keeps it until the next one is complete."""

from collections.abc import Iterable

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook


def keep_while_writing_(hooks: Iterable[Hook]) -> list[CheckpointHook]:
    """Let checkpoint hooks with ``max_keep_ckpts=1`` hold two files while they write.

    MMEngine deletes the checkpoints above the number before it writes the next one: a process
    killed in between has none. Call it before the hooks' ``before_train``, and ``remove_replaced``
    after each checkpoint.

    Args:
        hooks: Hooks of a runner.

    Returns:
        The hooks that it changed.
    """
    single = [h for h in hooks if isinstance(h, CheckpointHook) and h.max_keep_ckpts == 1]
    for hook in single:
        hook.max_keep_ckpts = 2
    return single


def remove_replaced(hooks: Iterable[CheckpointHook]) -> None:
    """Delete the checkpoints of ``keep_while_writing_`` that a newer, complete one replaces.

    Args:
        hooks: What ``keep_while_writing_`` returned.
    """
    for hook in hooks:
        while len(hook.keep_ckpt_ids) > 1:
            name = hook.filename_tmpl.format(hook.keep_ckpt_ids.popleft())
            path = hook.file_backend.join_path(hook.out_dir, name)
            if is_main_process() and hook.file_backend.isfile(path):
                hook.file_backend.remove(path)
