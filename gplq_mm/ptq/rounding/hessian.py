# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Hessians of layer outputs: sums of products of inputs, ``(groups, columns, columns)``."""

import torch
from torch import Tensor


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Hessian with a damped diagonal; inputs that are always zero are decoupled.

    Args:
        hessian: ``(groups, columns, columns)``.
        damping: Relative to the mean of the diagonal.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    raised = torch.where(diagonal > 0, diagonal, mean) + damping * mean
    return hessian - torch.diag_embed(diagonal) + torch.diag_embed(raised)


def stable_cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor; a singular matrix is damped until it and its inverse have a factor.

    Args:
        matrix: ``(groups, columns, columns)``, symmetric.

    Raises:
        ValueError: If the matrix holds NaN or infinity.
    """
    mean = matrix.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    for damping in (0.0, *(10.0**p for p in range(-9, 3))):
        lower, failed = torch.linalg.cholesky_ex(matrix + damping * mean * eye)
        if failed.any():
            continue
        inverse = torch.cholesky_inverse(lower)
        if not torch.linalg.cholesky_ex(inverse)[1].any() and inverse.isfinite().all():
            return lower
    raise ValueError('gptq: the Hessian holds NaN or infinity; check the calibration images')


def output_error(rows: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """Squared output error of each row, ``(groups, rows, 1)``: ``(w - v) H (w - v)^T``."""
    difference = rows - values
    return ((difference @ hessian) * difference).sum(2, keepdim=True)
