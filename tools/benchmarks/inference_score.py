# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Metric of a backend's model on the test set of a user's config."""

from typing import Any

import numpy as np
import torch
from inference_backends import SessionModel
from inference_models import is_detector, one_by_one, with_exported_part
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from torch import Tensor

from gplq_mm.integrations.mm.launch.config import apply_cfg_options

PREFERRED = ('accuracy/top1', 'coco/segm_mAP', 'coco/bbox_mAP')
"""Metrics of the table; the first one that a config's evaluator gives is reported."""


def score(about: dict[str, Any], opened: Any) -> dict[str, Any]:
    """Metric and value.

    Args:
        about: `case.json` of a user's model.
        opened: `TorchModel` or `SessionModel`; an exported model runs at its own image size.

    Raises:
        ValueError: If an exported model gets an image of another size.
    """
    cfg = Config.fromfile(about['config'])
    apply_cfg_options(cfg, {'data_root': about['data']} if about['data'] else {})
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model = opened.model if not isinstance(opened, SessionModel) else _around(about, opened)
    loader = one_by_one(cfg)
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    with torch.no_grad():
        for batch in loader:
            evaluator.process(data_samples=model.test_step(batch), data_batch=batch)
    found = evaluator.evaluate(len(loader.dataset))
    metric = next((name for name in PREFERRED if name in found), next(iter(found)))
    return {'metric': metric, 'value': float(found[metric])}


def _around(about: dict[str, Any], session: SessionModel) -> Any:
    """A classifier of torch whose logits come from a runtime."""
    from inference_files import open_case

    batch, size = min(session.sessions), tuple(about['size'])

    def logits(x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != size:
            raise ValueError(f'exported for images of {size}, the test set has {x.shape[-2:]}')
        images = np.resize(x.numpy(), (batch, *x.shape[1:]))
        return torch.from_numpy(session.sessions[batch](images)[0][: len(x)].copy())

    model = open_case(about).build_float()
    assert not is_detector(model)
    return with_exported_part(model, logits)
