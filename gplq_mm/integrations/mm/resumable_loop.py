# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""An epoch-based loop that can resume in the middle of an epoch."""

from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop

from ...compat.mmengine import count_epoch
from ...registry import LOOPS


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """MMEngine's epoch-based loop with exact resume in the middle of an epoch.

    MMEngine starts the epoch again and counts its iterations twice. This loop
    draws the batches that were already trained on (the workers' random streams advance with them)
    and continues with the next one. Together with ``GPLQHook``, which restores the main process's
    random state at that point, the resumed run equals the uninterrupted one bit for bit on CPU.

    Use it with iteration checkpoints::

        train_cfg = dict(type='gplq_mm.ResumableEpochLoop', max_epochs=1, val_interval=1)
        default_hooks = dict(checkpoint=dict(by_epoch=False, interval=2000))
    """

    def run_epoch(self) -> None:
        """Run one epoch, or the rest of it.

        Raises:
            ValueError: If the epochs of the checkpoint that is resumed from had another length.
        """
        batches_of_epoch = len(self.dataloader)
        done = self.iter - self.epoch * batches_of_epoch
        if not 0 <= done <= batches_of_epoch:
            raise ValueError(
                f'iteration {self.iter} is not in epoch {self.epoch + 1} of {batches_of_epoch} '
                'batches: the training set, the batch size or the number of processes differs from '
                'those of the interrupted run; resume with the same ones'
            )
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        batches = enumerate(self.dataloader)
        if done > 0:
            print_log(f'continuing after batch {done} of epoch {self.epoch + 1}', logger='current')
            for _ in range(done):
                next(batches)
            self.runner.call_hook('after_fast_forward')
        for index, batch in batches:
            self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        count_epoch(self)
