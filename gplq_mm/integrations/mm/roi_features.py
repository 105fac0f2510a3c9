# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Features by which two states of a two-stage detector are compared."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...ptq.rounding.feature_source import HeadFeatures, calls_of
from ...stream import Reached
from ...stream.calls import floating_tensors
from ...stream.interception import run_until_reached

PROPOSALS = 100
"""Proposals per image at which RoI heads are compared."""
_ENTRIES = ('predict', 'forward')
"""Methods by which a detector hands its proposals to the RoI head."""


class RoIFeatures(HeadFeatures):
    """What the RPN and, at the stage-1 model's proposals, the RoI heads get and give.

    Proposals of two models differ, so that features at each one's own could not be compared.

    Args:
        model: Two-stage detector of mmdet, with an ``rpn_head`` and a ``roi_head``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model.rpn_head)
        self.roi_head = model.roi_head
        self.heads = [m for n, m in self.roi_head.named_modules() if _is_head(n)]
        self._proposals: dict[int, tuple[list[Any], Any]] = {}

    def features(self, run: Callable[[], Any], index: int) -> list[Tensor]:
        """As in the base class; the first call for a batch keeps its proposals."""
        if index in self._proposals:
            first = self.calls_of_head(run)
        else:
            first = self._calls_up_to_proposals(run, index)
        if index not in self._proposals:
            return floating_tensors(first)
        ((maps, *_), _), *_ = first
        with calls_of(self.heads) as second:
            self.roi_head.forward(maps, *self._proposals[index])
        return floating_tensors((first, second))

    def _calls_up_to_proposals(self, run: Callable[[], Any], index: int) -> list[Any]:
        """Calls of the RPN; runs on until the proposals are handed over, and keeps those."""

        def keep(_: Any, proposals: list[Any], samples: Any, **__: Any) -> None:
            self._proposals[index] = ([p[:PROPOSALS] for p in proposals], samples)
            raise Reached

        own = vars(self.roi_head)
        own.update(dict.fromkeys(_ENTRIES, keep))
        try:
            with calls_of([self.head]) as calls:
                run_until_reached(run)
        finally:
            for name in _ENTRIES:
                del own[name]
        return calls


def _is_head(name: str) -> bool:
    """Whether a module of an RoI head is a head: ``bbox_head``, ``mask_head.0``, ..."""
    first, _, rest = name.partition('.')
    return first.endswith('_head') and (not rest or rest.isdigit())
