# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""QwT: fit of the side branches, block by block.

Source: arXiv 2411.13918, equation 6, as arXiv 2506.11784 (GPLQ) applies it:
``W* = (Y - Y_Z) X_Z^T (X_Z X_Z^T + lambda I)^-1``, here with a bias.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...calibration.float_weights import float_weights
from ...ops import QuantizedLayer
from ...stream.distributed import world
from ...stream.interception import Reached, intercepted
from ...stream.passes import Progress, RunPass
from .least_squares import NormalEquations
from .side_branch import CompensatedBlock, compensated_blocks, compensation_off

TARGETS = ('stage1', 'block')


@dataclass
class BlockResult:
    """Result of the fit of one block.

    Attributes:
        mse_before: Mean squared output error without the branch.
        mse_after: The same with the branch; equal if it was not kept.
        fitted: Whether the branch was kept: its expected error on other images, see
            ``NormalEquations.expected_mse``, is below ``mse_before``.
        tokens_per_image: Mean number of tokens of the calibration images.
    """

    mse_before: float = 0.0
    mse_after: float = 0.0
    fitted: bool = False
    tokens_per_image: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON report."""
        return asdict(self)


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def x(self) -> Any:
        return self.args[0] if self.args else next(iter(self.kwargs.values()))


class QwT:
    """Fit of all side branches of a model.

    For every block the calibration images run once through the stage-1 model and once
    through the quantized model with the earlier blocks compensated, both only up to
    the block.

    Args:
        model: Converted, quantized model in evaluation mode with attached branches.
        layers: The layers that stage 2 quantized.
        weights: Their stage-1 weights.
        biases: Their stage-1 biases; None if stage 2 changed none.
        norms: Stage-1 parameters of the normalizations; None if stage 2 changed none.
        ridge: See ``NormalEquations.solve``.
        target: ``stage1``: the block's output in the stage-1 model (also corrects errors
            of earlier blocks); ``block``: the float-weight block's output on the
            quantized model's own input.

    Raises:
        ValueError: If ``ridge`` is negative or ``target`` unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, QuantizedLayer],
        weights: Mapping[str, nn.Parameter],
        ridge: float = 1e-4,
        target: str = 'stage1',
        biases: Mapping[str, Tensor] | None = None,
        norms: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        if target not in TARGETS or not ridge >= 0:
            raise ValueError(
                f'compensation: got ridge={ridge!r}, target={target!r}; write a ridge of at '
                f'least 0 and a target of {TARGETS}'
            )
        self.model, self.layers, self.weights = model, layers, weights
        self.ridge, self.target = ridge, target
        self.biases, self.norms = biases, norms

    @torch.no_grad()
    def fit(self, run_pass: RunPass, progress: Progress | None = None) -> dict[str, BlockResult]:
        """Fit all branches in model order.

        Args:
            run_pass: Calls the model once for each of this rank's calibration
                images. These calls return None.
            progress: Called before each block.

        Returns:
            Result of each block.

        Raises:
            ValueError: If no block is reached, a block's output is not one tensor of
                its input's shape, or there is NaN or infinity.
        """
        blocks, results = compensated_blocks(self.model), {}
        for block in blocks.values():
            block.compensation.clear()
        for index, (name, block) in enumerate(blocks.items()):
            if progress is not None:
                progress(name, index, len(blocks))
            results[name] = self._fit_block(name, block, run_pass)
        if blocks and not any(r.tokens_per_image for r in results.values()):
            raise ValueError(
                'compensation: no block was reached; the calibration set is empty, or run_pass '
                'calls another model'
            )
        return results

    def _fit_block(self, name: str, block: CompensatedBlock, run_pass: RunPass) -> BlockResult:
        branch = block.compensation
        sums = NormalEquations(len(branch.bias), branch.weight.device)

        def add(run: Callable[[], Any]) -> None:
            call = _run_until(block, run)
            if call is not None:
                _check_call(name, call, sums.width)
                target = self._target_output(block, call, run)
                sums.add(call.x, target.double() - call.output.double())

        with intercepted(self.model, add):
            run_pass()
        sums.reduce()
        if sums.images == 0:
            return BlockResult()
        if not sums.is_finite:
            raise ValueError(f'{name}: NaN or infinity in the input or output of the block')
        weight, bias, freedom = sums.solve(self.ridge)
        weight, bias = _from_rank_0(weight, bias, branch.weight.device)
        before, after = sums.mse(), sums.mse(weight, bias)
        kept = sums.expected_mse(after, freedom) < before
        if kept:
            branch.set_values(weight, bias)
        return BlockResult(before, after if kept else before, kept, sums.tokens / sums.images)

    def _target_output(
        self, block: CompensatedBlock, call: _Call, run: Callable[[], Any]
    ) -> Tensor:
        """Target output of the block in this call."""
        with self._stage1():
            if self.target == 'block':
                return block.forward(*call.args, **call.kwargs)
            target = _run_until(block, run)
        assert target is not None
        return target.output

    @contextmanager
    def _stage1(self) -> Iterator[None]:
        stage1 = float_weights(self.layers, self.weights, self.biases, self.norms)
        with compensation_off(self.model), stage1:
            yield


def _run_until(block: nn.Module, run: Callable[[], Any]) -> _Call | None:
    """The first call of ``block`` during ``run``, which stops after it."""
    calls: list[_Call] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(_Call(args, kwargs, output))
        raise Reached

    handle = block.register_forward_hook(hook, with_kwargs=True)
    try:
        run()
    except Reached:
        pass
    finally:
        handle.remove()
    return calls[0] if calls else None


def _check_call(name: str, call: _Call, width: int) -> None:
    x, out = call.x, call.output
    fits = isinstance(x, Tensor) and isinstance(out, Tensor) and x.shape == out.shape
    if not fits or x.shape[-1] != width:
        raise ValueError(
            f'{name}: the block maps {_describe(x)} to {_describe(out)}; a branch needs one tensor '
            f'(B, ..., {width}) in and out, so leave the block out of compensation.blocks'
        )


def _describe(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _from_rank_0(weight: Tensor, bias: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rank 0's values on all ranks, on ``device``: solutions differ between ranks."""
    weight, bias = weight.to(device), bias.to(device)
    if world()[1] > 1:
        dist.broadcast(weight, 0)
        dist.broadcast(bias, 0)
    return weight, bias
