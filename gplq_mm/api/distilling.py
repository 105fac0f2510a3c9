# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""``gplq_mm.distill``: the loss that compares a quantized model with its float teacher."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import quantizers
from ..distillation.mimic_features import Recording, require_layers, watched
from ..distillation.mimic_settings import PENULTIMATE, resolve_mimic
from ..distillation.mimic_terms import PCA_BATCH, PCA_IMAGES, PCATerm, build_term, module_names
from ..distillation.score_head import SCORES
from ..distillation.teacher_precision import as_float, teacher_dtype, teacher_precision
from .inputs import Inputs, Run, call_model, collect
from .model_state import CALIBRATED, STAGE1, device_of, require_stage


@dataclass
class OutputRecording(Recording):
    """One forward pass of any torch module.

    Attributes:
        score_inputs: Inputs of the layers that compute the class scores, by name.
        multi_label: Whether each logit is a separate probability (sigmoid).
    """

    score_inputs: dict[str, Tensor] = field(default_factory=dict)
    multi_label: bool = False

    def levels(self, layer: str | None) -> list[Tensor]:
        """Feature maps of a layer; for ``penultimate`` the inputs of the score layers."""
        if layer != PENULTIMATE:
            return super().levels(layer)
        parts: list[Tensor] = []
        for found in self.score_inputs.values():
            if not any(found is known for known in parts):
                parts.append(found)
        return parts if len(parts) == 1 else [torch.cat(parts, -1)]

    def is_multi_label(self, task: str) -> bool:
        """Whether each logit of a task is a separate probability (sigmoid)."""
        return self.multi_label


class Distillation:
    """Loss between a quantized model and its float teacher, see ``distill``.

    Attributes:
        output: Output of the model in the last call, with its graph: the task loss needs no
            second forward pass.
        task_weight: The recipe's factor of the task loss.
    """

    output: Any = None

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        loader: Iterable[Any] | None = None,
        multi_label: bool = False,
    ) -> None:
        self.state = require_stage(model, (CALIBRATED, STAGE1))
        require_teacher(model, teacher)
        self.model, self.teacher = model, teacher.requires_grad_(False).eval()
        self.loader, self.multi_label = loader, multi_label
        self._terms: list[Any] | None = None
        self._score_layers: list[str] = []
        settings = self._settings(has_penultimate=True)
        self.task_weight = settings['task_weight']
        for term in settings['terms']:
            require_layers(teacher, module_names(term))

    def __call__(self, inputs: Inputs) -> Tensor:
        """The loss of one batch.

        Args:
            inputs: ``(B, ...)``, or a dict of the model's keyword arguments.

        Returns:
            Scalar: the recipe's terms, each with its weight.

        Raises:
            ValueError: If the model does not have the features that a term compares.
        """
        if self._terms is None:
            self._terms = self._prepare(inputs)
        student = self._recording(self.model)
        self.output = self._run(student, inputs)
        reference = self._run_teacher(inputs)
        losses = [term.settings['loss_weight'] * term(student, reference) for term in self._terms]
        return torch.stack(losses).sum()

    def _settings(self, has_penultimate: bool) -> dict[str, Any]:
        mimic = self.state.recipe.mimic
        settings = resolve_mimic(mimic, self.state.is_detector, has_penultimate)
        if settings is None:
            raise ValueError(
                f'recipe.mimic={mimic!r} compares nothing; leave gplq_mm.distill out, or write '
                "recipe=dict(mimic=dict(type='auto'))"
            )
        return settings

    def _prepare(self, inputs: Inputs) -> list[Any]:
        self._score_layers = score_layers(
            self.model, self.teacher, partial(call_model, inputs=inputs)
        )
        terms = [build_term(t) for t in self._settings(bool(self._score_layers))['terms']]
        if not self._score_layers and any(t.settings.get('layer') == PENULTIMATE for t in terms):
            raise ValueError(
                f'no Linear layer gives the output of {type(self.model).__name__}, so it has no '
                "penultimate feature; write recipe=dict(mimic=dict(type='logits'))"
            )
        self._names = list(dict.fromkeys(n for t in terms for n in t.layers if n != SCORES))
        self._features = self._feature_module(terms)
        for term in terms:
            if isinstance(term, PCATerm):
                term.fit(self.teacher, self._pca_batches(term), self._pca_run)
        return terms

    def _feature_module(self, terms: list[Any]) -> str | None:
        """Module whose output a feature term with ``layer=None`` compares: neck or backbone."""
        if not any('layer' in t.settings and t.settings['layer'] is None for t in terms):
            return None
        name = neck_or_backbone(self.model)
        if name is not None:
            return name
        raise ValueError(
            f'{type(self.model).__name__} has no backbone; write recipe=dict(mimic=dict('
            "type='feature', layer=NAME)) with the name of a module that returns a feature map"
        )

    def _recording(self, model: nn.Module) -> OutputRecording:
        return OutputRecording(model, multi_label=self.multi_label)

    def _run(self, recording: OutputRecording, inputs: Inputs) -> Any:
        names = [*self._names, *([self._features] if self._features else [])]
        layers = {n: recording.model.get_submodule(n) for n in self._score_layers}
        with watched(recording, names), inputs_kept(layers, recording.score_inputs):
            output = call_model(recording.model, inputs)
        recording.outputs[SCORES] = output
        if self._features is not None:
            recording.features = recording.outputs[self._features]
        return output

    @torch.no_grad()
    def _run_teacher(self, inputs: Inputs) -> OutputRecording:
        recording = self._recording(self.teacher)
        device = device_of(self.teacher)
        dtype = teacher_dtype(self.state.engine.teacher, device)
        with teacher_precision(dtype, device):
            self._run(recording, inputs)
        recording.features = as_float(recording.features)
        recording.outputs = as_float(recording.outputs)
        recording.score_inputs = as_float(recording.score_inputs)
        return recording

    def _pca_batches(self, term: PCATerm) -> list[Inputs]:
        if self.loader is None:
            raise ValueError(
                "recipe.mimic.type='pca' needs images for its basis; write "
                'gplq_mm.distill(model, teacher, loader)'
            )
        number = term.settings['num_images'] or PCA_IMAGES
        return collect(self.loader, number, PCA_BATCH).batches()

    def _pca_run(self, teacher: Any, inputs: Inputs, layers: Any) -> OutputRecording:
        """The teacher's recording in float32."""
        recording = self._recording(teacher)
        with torch.no_grad():
            self._run(recording, inputs)
        return recording


def distill(
    model: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    multi_label: bool = False,
) -> Distillation:
    """The loss terms that the recipe's ``mimic`` describes, for any training loop.

    For a classifier with a preset such as w4a4: divergence of the class distributions, and the
    relative error of the penultimate feature (the input of the layers that compute the scores).
    Create it once, before the loop::

        mimic = gplq_mm.distill(model, teacher)
        for x, y in loader:
            loss = mimic(x) + F.cross_entropy(mimic.output, y)

    Args:
        model: Model of ``gplq_mm.quantize``, calibrated.
        teacher: The float model: a ``copy.deepcopy`` from before ``quantize``. It is frozen.
        loader: Images for the basis of ``mimic=dict(type='pca')``; see ``gplq_mm.calibrate``.
        multi_label: Whether each logit is a separate probability (sigmoid).

    Returns:
        A function of one batch: ``mimic(x)`` runs both models and returns a scalar.

    Raises:
        ValueError: If the model is not calibrated, the teacher is not float or is the model
            itself, or the recipe's ``mimic`` is None or does not fit.
    """
    return Distillation(model, teacher, loader, multi_label)


def score_layers(model: nn.Module, teacher: nn.Module, run: Run) -> list[str]:
    """Names of the layers that compute the class scores, in both models.

    Layers with the role ``predictor``, which adapters set; in other models the Linear layers
    whose output is the model's output.

    Args:
        model: Quantized model.
        teacher: Float model; it runs if no layer has the role.
        run: Runs a model with one batch.
    """
    found = [n for n, q in quantizers(model, 'activation').items() if q.role == 'predictor']
    names = {name for name, _ in teacher.named_modules()}
    predictors = [n.rpartition('.')[0] for n in found]
    if predictors and names.issuperset(predictors):
        return predictors
    outputs: dict[str, Any] = {}
    handles = [
        layer.register_forward_hook(partial(_keep_output, outputs, name))
        for name, layer in teacher.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        with torch.no_grad():
            result = run(teacher)
    finally:
        for handle in handles:
            handle.remove()
    given = result if isinstance(result, tuple | list) else [result]
    return [n for n, y in outputs.items() if any(y is other for other in given)]


def neck_or_backbone(model: nn.Module) -> str | None:
    """Name of the module whose output is a model's feature maps; None if it has none."""
    names = ('neck', 'backbone')
    return next((n for n in names if isinstance(getattr(model, n, None), nn.Module)), None)


def _keep_output(outputs: dict[str, Any], name: str, _: Any, __: Any, output: Any) -> None:
    outputs[name] = output


@contextmanager
def inputs_kept(layers: dict[str, nn.Module], found: dict[str, Tensor]) -> Iterator[None]:
    """Context manager: the latest input of each layer goes into ``found``."""

    def keep(name: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            found[name] = args[0]

        return hook

    handles = [layer.register_forward_pre_hook(keep(n)) for n, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def require_teacher(model: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that is no float model.

    Raises:
        ValueError: If it is the model itself, or quantized.
    """
    if teacher is model or quantizers(teacher):
        raise ValueError(
            'the teacher is quantized itself; write teacher = copy.deepcopy(model) before '
            'gplq_mm.quantize(model)'
        )
