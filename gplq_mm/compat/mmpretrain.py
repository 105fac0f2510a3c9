# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Undocumented parts of mmpretrain that the package uses.

No other file uses a private name of mmpretrain; ``tests/test_compat/test_mmpretrain.py`` has a test
for each function here, which fails if mmpretrain changes.
"""

from typing import Any

from torch import Tensor


def loss_of_scores(classifier: Any, scores: Tensor, data_samples: Any, **kwargs: Any) -> Any:
    """Loss of a ``TimmClassifier`` from its scores ``(B, classes)``.

    Args:
        classifier: The classifier.
        scores: Output of timm's model.
        data_samples: Samples with their labels.
        **kwargs: Arguments of the loss module.
    """
    return classifier._get_loss(scores, data_samples, **kwargs)
