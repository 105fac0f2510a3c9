# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Mimicking losses against independent formulas."""

import pytest
import torch
from torch import nn

from gplq_mm.distillation.losses import PCAMimicLoss, RelativeFeatureLoss, SoftLogitLoss


def test_pca_loss_ignores_what_lies_outside_its_span_and_the_mean() -> None:
    components = torch.eye(8)[:, :3]
    loss = PCAMimicLoss(components)
    student = torch.randn(5, 8)
    teacher = student.clone()
    teacher[:, 3:] += 7
    assert loss(student, teacher) == 0
    teacher[:, 0] += 2
    assert torch.isclose(loss(student, teacher), torch.tensor(4.0))


def test_relative_feature_loss_does_not_depend_on_units() -> None:
    loss = RelativeFeatureLoss()
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    value = loss([student], [teacher])
    assert torch.isclose(loss([student * 10], [teacher * 10]), value, rtol=1e-5)
    oracle = ((student - teacher) ** 2).sum() / (teacher**2).sum()
    assert torch.isclose(value, oracle)


def test_relative_feature_loss_refuses_other_levels() -> None:
    with pytest.raises(ValueError, match='1 student levels for 2 teacher levels'):
        RelativeFeatureLoss()([torch.ones(1)], [torch.ones(1), torch.ones(1)])


def test_soft_logit_loss_has_the_gradient_of_soft_cross_entropy() -> None:
    student = torch.randn(4, 10, requires_grad=True)
    teacher = torch.randn(4, 10)
    SoftLogitLoss()(student, teacher).backward()
    twin = student.detach().clone().requires_grad_()
    nn.functional.cross_entropy(twin, teacher.softmax(-1)).backward()
    assert torch.allclose(student.grad, twin.grad, atol=1e-6)
    assert SoftLogitLoss(2.0)(teacher, teacher) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match='temperature'):
        SoftLogitLoss(0.0)


def test_a_multi_label_loss_sees_a_shift_of_all_logits() -> None:
    teacher = torch.randn(4, 5)
    assert SoftLogitLoss()(teacher + 3, teacher) < 1e-6
    loss = SoftLogitLoss(multi_label=True)
    p, q = (teacher + 3).sigmoid(), teacher.sigmoid()
    wanted = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    torch.testing.assert_close(loss(teacher + 3, teacher), wanted.sum(1).mean())


def test_pca_loss_is_float32_under_autocast() -> None:
    loss, student = PCAMimicLoss(torch.eye(300)), torch.full((2, 300), 280.0)
    with torch.autocast('cpu', torch.float16):
        found = loss(student, torch.zeros_like(student))
    assert found.dtype == torch.float32
    assert found == pytest.approx(300 * 280.0**2)
