# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Feature error of a calibrated model relative to the float model, in total and by role."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import floating, quantizers, state_keys
from ..ptq.corrections.side_branch import CompensatedBlock
from ..quantizers import FakeQuantizer
from ..stream.distributed import gather
from .output_metrics import KL, SQNR

WEIGHTS = 'weights'
"""Takes the place of a role for weights, if stage 1 quantizes them."""

State = Callable[[], AbstractContextManager[None]]
"""Context manager that puts the model into a state and restores the previous one."""
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class StartOutputs:
    """Compared outputs of one batch.

    Attributes:
        features: One tensor per level: a classifier's penultimate feature, a detector's neck
            outputs.
        scores: RPN scores, one tensor per level; empty without an RPN.
        logits: ``(B, classes)``, one tensor per task; empty if the model is not a classifier.
    """

    features: Sequence[Tensor]
    scores: Sequence[Tensor] = ()
    logits: Sequence[Tensor] = ()


@dataclass(frozen=True)
class StartFigures:
    """Differences between the quantized and the float model.

    Attributes:
        feature_error: ``||f_q - f||^2 / ||f||^2``, mean over levels.
        levels: The same for each level.
        rpn_error: The same of the RPN's scores; None without an RPN.
        kl: Mean divergence of the class probabilities in nats; None without logits.
        agreement: Share of images with the same top-1 class; None without logits.
    """

    feature_error: float
    levels: tuple[float, ...]
    rpn_error: float | None = None
    kl: float | None = None
    agreement: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a report, without the figures that are None."""
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass(frozen=True)
class RoleError:
    """Feature error with the operands of one role float.

    Attributes:
        role: One of ``recipe.ROLES``, or ``WEIGHTS``.
        operands: Number of operands with the role.
        feature_error: Remaining error; the smaller, the larger the role's contribution.
    """

    role: str
    operands: int
    feature_error: float


class StartMeter:
    """Compares a calibrated model with the float one, batch by batch.

    Args:
        model: Converted model, calibrated, in evaluation mode.
        forward: Outputs for one batch.
        batches: This rank's batches with their global numbers, equal in every call.
        as_float: State in which the model is the float model.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[Any], StartOutputs],
        batches: Callable[[], Iterable[tuple[int, Any]]],
        as_float: State,
    ) -> None:
        self.model = model
        self.forward = forward
        self.batches = batches
        self.as_float = as_float

    def figures(self) -> StartFigures:
        """Figures of the model in its current state, equal on all ranks."""
        return _figures(self._compare({'': lambda: floating(())})[''])

    def role_errors(self) -> list[RoleError]:
        """Feature error with each role float in turn, the largest contribution first."""
        groups = active_roles(self.model)
        states: dict[str, State] = {r: _opener(found) for r, found in groups.items()}
        sums = self._compare(states)
        errors = [RoleError(r, len(q), _figures(sums[r]).feature_error) for r, q in groups.items()]
        return sorted(errors, key=lambda e: (e.feature_error != e.feature_error, e.feature_error))

    @torch.no_grad()
    def _compare(self, states: Mapping[str, State]) -> dict[str, Terms]:
        """Terms of each state, summed over the batches of all ranks in their order."""
        mine: dict[int, dict[str, Terms]] = {}
        for number, batch in self.batches():
            with self.as_float():
                reference = self.forward(batch)
            mine[number] = {}
            for name, state in states.items():
                with state():
                    mine[number][name] = _terms(reference, self.forward(batch))
        found = {number: terms for share in gather(mine) for number, terms in share.items()}
        ordered = [found[number] for number in sorted(found)]
        return {name: _sum([terms[name] for terms in ordered]) for name in states}


def active_roles(model: nn.Module) -> dict[str, list[FakeQuantizer]]:
    """Active quantizers by role; those of weights under ``WEIGHTS``."""
    groups: dict[str, list[FakeQuantizer]] = {}
    for quantizer in quantizers(model).values():
        if quantizer.is_active:
            role = quantizer.role if quantizer.kind == 'activation' else WEIGHTS
            groups.setdefault(role, []).append(quantizer)
    return groups


@contextmanager
def as_float_model(model: nn.Module, float_state: Mapping[str, Tensor]) -> Iterator[None]:
    """Context manager: a converted model is the float model; restored at the end.

    Args:
        model: Converted model.
        float_state: FP32 weights by name; the model's own weights may have changed. Names that
            the model does not have are ignored.
    """
    kept = {k: v.clone() for k, v in model.state_dict().items() if k in float_state}
    model.load_state_dict(float_state, strict=False)
    try:
        with floating(quantizers(model).values()):
            yield
    finally:
        model.load_state_dict(kept, strict=False)


def quantization_keys(model: nn.Module) -> set[str]:
    """State-dict keys that the conversion added to those of the float model."""
    names: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantizer):
            names |= {f'{name}.{k}' for k in module.state_dict()}
        elif isinstance(module, CompensatedBlock):
            child = module.compensation.state_dict()
            names |= {f'{name}.compensation.{k}' for k in child}
    keys = state_keys(model)
    return {keys[name] for name in names}


def float_state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy of a converted model's weights by name, without what the conversion added."""
    added = quantization_keys(model)
    return {k: v.detach().clone() for k, v in model.state_dict().items() if k not in added}


def _opener(chosen: Sequence[FakeQuantizer]) -> State:
    return lambda: floating(chosen)


def _terms(reference: StartOutputs, outputs: StartOutputs) -> Terms:
    """Terms of one batch that add up over batches."""
    power = SQNR()
    terms = {'features': power.terms(reference.features, outputs.features)}
    if reference.scores:
        terms['scores'] = power.terms(reference.scores, outputs.scores)
    if reference.logits:
        terms['logits'] = KL().terms(reference.logits, outputs.logits)
        terms['agreement'] = _agreement(reference.logits, outputs.logits)
    return {name: value.cpu() for name, value in terms.items()}


def _agreement(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> Tensor:
    """Number of rows with the same top-1 class, and of all rows."""
    same = [r.argmax(1) == o.argmax(1) for r, o in zip(reference, outputs, strict=True)]
    joined = torch.cat(same).double()
    return torch.stack([joined.sum(), joined.new_tensor(len(joined))])


def _sum(terms: Sequence[Terms]) -> Terms:
    return {name: torch.stack([t[name] for t in terms]).sum(0) for name in terms[0]}


def _figures(sums: Terms) -> StartFigures:
    noise, signal = sums['features'][::2], sums['features'][1::2]
    return StartFigures(
        feature_error=SQNR().increase(sums['features']),
        levels=tuple((noise / signal.clamp_min(1e-300)).tolist()),
        rpn_error=SQNR().increase(sums['scores']) if 'scores' in sums else None,
        kl=KL().increase(sums['logits']) if 'logits' in sums else None,
        agreement=float(sums['agreement'][0] / sums['agreement'][1]) if 'logits' in sums else None,
    )
