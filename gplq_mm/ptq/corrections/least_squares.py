# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Streaming ridge regression of block residuals on block inputs."""

import torch
from torch import Tensor

from ...stream.exact_sum import ExactSum


class NormalEquations:
    """Normal equations of ``residual ~ W x + b``, in float64.

    They keep sums of the size of the squared width, not the tokens. One image is one
    term, so the sums are bit-equal for every split of the images over ranks.

    Args:
        width: Channels C.
        device: Device of the tokens.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.width = width
        self._products = ExactSum((width + 1, 2 * width + 1), device)  # [x 1]^T [x 1 r]
        self._scalars = ExactSum((2,), device)  # sum of r^2, images

    def add(self, x: Tensor, residual: Tensor) -> None:
        """Add a batch of tokens.

        Args:
            x: Block inputs, ``(B, ..., C)``.
            residual: Target output of the branch, same shape.
        """
        for image, target in zip(x, residual, strict=True):
            tokens = image.reshape(-1, self.width).double()
            targets = target.reshape(-1, self.width).double()
            ones = tokens.new_ones(len(tokens), 1)
            self._products.add(
                torch.cat([tokens, ones], 1).T @ torch.cat([tokens, ones, targets], 1)
            )
            self._scalars.add(torch.stack([targets.square().sum(), targets.new_tensor(1.0)]))

    def reduce(self) -> None:
        """Sum over all ranks."""
        self._products.reduce()
        self._scalars.reduce()

    @property
    def images(self) -> int:
        """Images added."""
        return int(self._scalars.value()[1])

    @property
    def tokens(self) -> int:
        """Tokens added."""
        return int(self._products.value()[self.width, self.width])

    @property
    def is_finite(self) -> bool:
        """Whether no NaN or infinity was added."""
        return bool(self._products.value().isfinite().all())

    def mse(self, weight: Tensor | None = None, bias: Tensor | None = None) -> float:
        """Mean squared error of ``residual - W x - b`` over all tokens and channels.

        Args:
            weight: ``(C, C)``; None for no branch.
            bias: ``(C,)``, given together with ``weight``.
        """
        loss = self._scalars.value()[0].cpu()
        if weight is not None and bias is not None:
            products = self._products.value().cpu()
            gram, cross = products.split([self.width + 1, self.width], dim=1)
            coefficients = torch.cat([weight.T, bias[None]]).double().cpu()
            loss = loss + (coefficients * (gram @ coefficients - 2 * cross)).sum()
        return float(loss) / max(self.tokens * self.width, 1)

    def expected_mse(self, mse: float, freedom: float) -> float:
        """Expected mean squared error on other images (generalised cross-validation).

        Args:
            mse: Error on the added images.
            freedom: Degrees of freedom of the fit, see ``solve``.

        Returns:
            ``mse / (1 - freedom / tokens)^2``; infinity with too few tokens.

        Source: Golub, Heath, Wahba, Technometrics 21 (1979), equation 1.4.
        """
        share = 1 - freedom / max(self.tokens, 1)
        return mse / share**2 if share > 0 else float('inf')

    def solve(self, ridge: float) -> tuple[Tensor, Tensor, float]:
        """Ridge solution; the bias is not penalised.

        Args:
            ridge: Penalty relative to the mean variance of the channels of x.
                Directions in which x varies by no more than the rounding of float32
                get no weight, so that singular systems have a solution with ``ridge=0``.

        Returns:
            ``(weight (C, C), bias (C,), degrees of freedom)``, float32, on the CPU.
        """
        products, width = self._products.value().cpu(), self.width
        count = products[width, width]
        sum_x, sum_r = products[:width, width], products[width, width + 1 :]
        gram = products[:width, :width] - torch.outer(sum_x, sum_x) / count
        cross = products[:width, width + 1 :] - torch.outer(sum_x, sum_r) / count
        values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
        noise = 4 * torch.finfo(torch.float32).eps ** 2 * products[:width, :width].trace()
        values = torch.where(values > noise, values, 0.0)
        penalised = values + ridge * values.sum() / width
        inverse = torch.where(values > 0, 1 / penalised, 0.0)
        weight = vectors @ (inverse[:, None] * (vectors.T @ cross))  # (C_in, C_out)
        bias = (sum_r - sum_x @ weight) / count
        freedom = 1 + float((values * inverse).sum())
        return weight.T.float().contiguous(), bias.float(), freedom
