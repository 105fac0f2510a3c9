# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
from collections import OrderedDict

import pytest
from torch import nn

from gplq_mm.convert import convert_, quantized_layers, roles
from gplq_mm.convert.roles import register_roles, set_ffn_roles, set_predictor_roles

CONTEXT_RULES = [
    dict(role='post_gelu', num_bits=5, optional=True),
    dict(role='post_relu', num_bits=6, optional=True),
    dict(role='predictor', num_bits=7, optional=True),
]


class Recorder:
    def __init__(self) -> None:
        self.roles: dict[str, str] = {}

    def set_role(self, name: str, role: str) -> None:
        self.roles[name] = role


def test_ffn_roles_follow_the_activation() -> None:
    act = nn.GELU()
    ffn = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), act, nn.Dropout(0.1)),
        nn.Sequential(nn.Linear(2, 2), act, nn.Dropout(0.1)),  # the same object again
        nn.Linear(2, 2),
        nn.ReLU(),
        nn.Conv2d(2, 2, 1),
        nn.Linear(2, 2),
    )
    recorder = Recorder()
    set_ffn_roles(ffn, 'a.layers', recorder)
    assert recorder.roles == {
        'a.layers.1.0': 'post_gelu',
        'a.layers.2': 'post_gelu',
        'a.layers.4': 'post_relu',
    }


def test_predictors_are_the_last_layers_of_the_named_branches() -> None:
    head = nn.Module()
    head.fc_cls = nn.Linear(2, 2)
    head.cls_fcs = nn.ModuleList([nn.Linear(2, 2)])
    head.reg_branches = nn.ModuleList(
        [nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 4), nn.Identity())] * 1
        + [nn.Linear(2, 4)]
    )
    head.bn_cls = nn.Sequential(OrderedDict(linear=nn.Linear(2, 2), bn=nn.BatchNorm1d(2)))
    head.loss_cls = nn.CrossEntropyLoss()
    recorder = Recorder()
    set_predictor_roles(head, '', recorder, '(^|_)(cls|branches)$')
    names = {'fc_cls', 'reg_branches.0.2', 'reg_branches.1', 'bn_cls.linear'}
    assert recorder.roles == dict.fromkeys(names, 'predictor')


def test_roles_reach_subclasses_and_come_before_the_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

    class UsersHead(Head):
        pass

    monkeypatch.setattr(roles, 'ROLE_GIVERS', [])

    @register_roles(Head)
    def give(module: Head, name: str, context: Recorder) -> None:
        context.set_role(f'{name}.fc', 'predictor')

    model = nn.ModuleDict({'head': UsersHead(), 'other': nn.Linear(2, 2)})
    convert_(model, dict(base='w4a4', scope=['head.fc'], rules=CONTEXT_RULES))
    (layer,) = quantized_layers(model).values()
    assert layer is model['head'].fc
    assert layer.weight_quantizer.spec.num_bits == 7
