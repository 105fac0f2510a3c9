# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import torch
from torch import Tensor, nn

from gplq_mm.distillation.teacher_cache import TeacherCache
from gplq_mm.integrations.mm import model_structure  # noqa: F401  registers the score head


class Head(nn.Linear):
    def forward(self, features: tuple) -> Tensor:
        return super().forward(features[0])


class Teacher(nn.Module):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Head(3, 2)
        self.calls = 0

    def extract_feat(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.calls += 1
        return inputs.mean((2, 3)), [inputs * 2]


def run(cache: TeacherCache, teacher: Teacher, inputs: Tensor, dtype=torch.float32):
    return cache.run(teacher, inputs, ['head'], dtype)


def test_second_time_is_read_in_any_order(tmp_path) -> None:
    teacher, images = Teacher(), torch.randn(4, 3, 2, 2)
    cache = TeacherCache(tmp_path, 'checkpoint', with_features=True)
    first = run(cache, teacher, images)
    order = torch.tensor([2, 0])
    again = run(TeacherCache(tmp_path, 'checkpoint', True), teacher, images[order])
    assert teacher.calls == 1
    assert torch.equal(again.outputs['head'], first.outputs['head'][order])
    assert torch.equal(again.features[0], first.features[0][order])
    assert torch.equal(again.features[1][0], first.features[1][0][order])
    assert torch.equal(again.logits()[''], first.logits()[''][order])


def test_another_image_teacher_or_type_is_another_entry(tmp_path) -> None:
    teacher, images = Teacher(), torch.randn(1, 3, 2, 2)
    cache = TeacherCache(tmp_path, 'checkpoint', with_features=False)
    run(cache, teacher, images)
    run(cache, teacher, images + 1e-6)
    run(TeacherCache(tmp_path, 'other', False), teacher, images)
    run(cache, teacher, images, torch.bfloat16)
    assert teacher.calls == 4
    assert run(cache, teacher, images).features is None  # logits alone take a few bytes
    assert teacher.calls == 4
    assert not list(tmp_path.rglob('*.tmp'))


def test_a_damaged_entry_is_computed_again(tmp_path) -> None:
    teacher, images = Teacher(), torch.randn(2, 3, 2, 2)
    cache = TeacherCache(tmp_path, 'checkpoint', with_features=True)
    first = run(cache, teacher, images)
    damaged = sorted(tmp_path.rglob('*.pt'))[0]
    damaged.write_bytes(b'garbage')
    again = run(cache, teacher, images)
    assert teacher.calls == 2
    assert torch.equal(again.outputs['head'], first.outputs['head'])
    run(cache, teacher, images)
    assert teacher.calls == 2
