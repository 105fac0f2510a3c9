# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Features, outputs or loss of a model for a batch, as compared by sensitivity and gate."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....analysis.output_metrics import Metric, Outputs, build_metric
from ....analysis.start_error import StartOutputs
from ....distillation.mimic_features import Recording, has_penultimate
from ....distillation.mimic_settings import PENULTIMATE
from ....distillation.score_head import score_head
from ..roi_features import PROPOSALS
from .calibration_data import ends_before_heads

IndexedBatch = tuple[int, Any]


def build_comparison(
    model: Any, metric: str, seed: int = 0
) -> tuple[Metric, Callable[[IndexedBatch], Outputs]]:
    """A metric and the function that computes the values it compares.

    ``sqnr`` compares features if the scope ends before the heads, else the outputs of the
    heads; ``kl`` compares class scores; ``loss`` is the task loss with seeded samplers. The
    heads of a two-stage detector always get the proposals of the first call for a batch, so
    that their outputs can be compared.

    Args:
        model: Converted MMEngine model, not wrapped.
        metric: ``sqnr``, ``kl`` or ``loss``.
        seed: For random samplers inside the loss.

    Raises:
        ValueError: If the metric is unknown or the model has no class scores for ``kl``.
    """
    if metric == 'loss':
        return build_metric(metric), _TaskLoss(model, seed)
    if metric != 'kl':
        return build_metric(metric), _RawOutputs(model)
    sigmoid = _gives_sigmoid(model)
    return build_metric('kl', sigmoid=sigmoid), _ClassScores(model)


class _RawOutputs:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.features_only = ends_before_heads(model)
        self.proposals: dict[int, list[Any]] = {}

    def __call__(self, indexed: IndexedBatch) -> Outputs:
        index, batch = indexed
        data = self.model.data_preprocessor(batch, False)
        if self.features_only:
            return list(flatten(self.model.extract_feat(data['inputs'])))
        if hasattr(self.model, 'roi_head'):
            return list(flatten(self.two_stage(index, data)))
        return list(flatten(self.model(data['inputs'], data.get('data_samples'), mode='tensor')))

    def two_stage(self, index: int, data: Mapping[str, Any]) -> Sequence[Any]:
        """Outputs of the first stage, and of the second for the stored proposals."""
        samples, features = data['data_samples'], self.model.extract_feat(data['inputs'])
        first = self.model.rpn_head(features)
        if index not in self.proposals:
            found = self.model.rpn_head.predict(features, samples, rescale=False)
            self.proposals[index] = [proposals[:PROPOSALS] for proposals in found]
        return [first, self.model.roi_head.forward(features, self.proposals[index], samples)]


class _ClassScores(_RawOutputs):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.features_only = False

    def __call__(self, indexed: IndexedBatch) -> Outputs:
        index, batch = indexed
        data = self.model.data_preprocessor(batch, False)
        if hasattr(self.model, 'roi_head'):
            _, second = self.two_stage(index, data)
            return list(flatten(second[0]))
        outputs = self.model(data['inputs'], data.get('data_samples'), mode='tensor')
        return list(flatten(outputs if isinstance(outputs, Tensor) else outputs[0]))


def start_outputs(model: Any, batch: Any) -> StartOutputs:
    """Features of a batch, with the RPN's scores or the class logits if the model has them.

    Logits of a segmentor are those of every pixel.

    Features are a classifier's penultimate feature, else the result of ``extract_feat()`` (a
    detector's neck), else the model's output.

    Args:
        model: MMEngine model in evaluation mode, not wrapped.
        batch: Collated images.
    """
    data = model.data_preprocessor(batch, False)
    if not hasattr(model, 'extract_feat'):
        given = model(data['inputs'], data.get('data_samples'), mode='tensor')
        return StartOutputs(list(flatten(given)))
    recording = Recording(model, model.extract_feat(data['inputs']))
    levels = recording.levels(PENULTIMATE if has_penultimate(model) else None)
    if hasattr(model, 'rpn_head'):
        scores = model.rpn_head(recording.features)[0]
        return StartOutputs(levels, scores=list(flatten(scores)))
    return StartOutputs(levels, logits=_single_label_logits(recording))


def _single_label_logits(recording: Recording) -> list[Tensor]:
    if score_head(recording.model) is None:
        return []
    found = recording.logits()
    return [x for task, x in found.items() if not recording.is_multi_label(task) and x.dim() == 2]


class _TaskLoss:
    def __init__(self, model: Any, seed: int) -> None:
        self.model = model
        self.seed = seed

    def __call__(self, indexed: IndexedBatch) -> Outputs:
        index, batch = indexed
        data = self.model.data_preprocessor(batch, False)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed + index)
            losses = self.model.loss(data['inputs'], data['data_samples'])
        return [self.model.parse_losses(losses)[0]]


def flatten(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors of nested lists and dicts, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from flatten(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from flatten(item)


def _gives_sigmoid(model: Any) -> bool:
    """Whether class scores are sigmoids (dense heads); False if they are a softmax."""
    if hasattr(model, 'roi_head'):
        return False
    head = getattr(model, 'bbox_head', None)
    if head is None and (score_head(model) is not None or hasattr(model, 'decode_head')):
        return False
    if getattr(head, 'use_sigmoid_cls', False):
        return True
    raise ValueError(
        f"metric='kl': {type(model).__name__} gives no class scores whose probabilities are "
        "known here; write metric='sqnr' or metric='loss'"
    )
