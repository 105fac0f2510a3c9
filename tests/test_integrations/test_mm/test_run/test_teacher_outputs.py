# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gplq_mm.distillation.mimicking import Mimicking
from gplq_mm.integrations.mm.run.teacher_outputs import attach_teacher_cache, check_teacher_cache
from gplq_mm.ops import Engine


class Student(Mimicking):
    def __init__(self, folder: Any, **preprocessor: Any) -> None:
        self.gplq = SimpleNamespace(engine=Engine(teacher_cache=folder))
        self.data_preprocessor = SimpleNamespace(**preprocessor)
        self.mimic = {'terms': [{'type': 'logits'}]}


class Images:
    def __init__(self, random: bool) -> None:
        self.random = random
        self.pipeline = SimpleNamespace(transforms=[SimpleNamespace()])

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = torch.randint(0, 2, (3, 4, 4)) if self.random else torch.zeros(3, 4, 4)
        return {'inputs': torch.full((3, 4, 4), index) + noise}


def runner(random: bool) -> Any:
    return SimpleNamespace(
        train_loop=SimpleNamespace(dataloader=SimpleNamespace(dataset=Images(random)))
    )


def test_random_pipelines_are_refused() -> None:
    check_teacher_cache(Student('folder'), runner(False))
    check_teacher_cache(Student(None), runner(True))
    with pytest.raises(ValueError, match=r'changes images at random \(SimpleNamespace\)'):
        check_teacher_cache(Student('folder'), runner(True))
    with pytest.raises(ValueError, match='batch_augments mix images'):
        check_teacher_cache(Student('folder', batch_augments=object()), runner(False))


def test_without_a_teacher_it_is_refused() -> None:
    model = SimpleNamespace(gplq=SimpleNamespace(engine=Engine(teacher_cache='folder')))
    with pytest.raises(ValueError, match='the recipe has no teacher'):
        check_teacher_cache(model, runner(False))


def test_only_what_the_terms_need_is_kept(tmp_path) -> None:
    student = Student(str(tmp_path))
    assert not student.needs_features
    attach_teacher_cache(student, {'sha256': 'abc'})
    assert student.__dict__['_cache'][0].folder == tmp_path
    student.mimic['terms'].append({'type': 'feature'})
    assert student.needs_features
