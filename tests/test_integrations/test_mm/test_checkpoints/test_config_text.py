# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
from mmengine.config import Config

from gplq_mm.integrations.mm.checkpoints.config_text import parse_config_text


def test_reads_what_mmengine_writes():
    content = dict(
        a=dict(b=[dict(c=(1, -2.5)), 'x\'y"z'], d=None, e={'.cls_token': dict(f=0.0), 'g': True}),
        numbers=[1e-05, (3,)],
        empty=dict(),
        pipeline=[dict(type='Load'), [dict(type='Pack')], ()],
    )
    cfg = Config(content)
    assert parse_config_text(cfg.pretty_text) == cfg.to_dict() == content


@pytest.mark.parametrize(
    'text',
    [
        "import os\nos.system('true')",
        "a = __import__('os')",
        'a = dict(b=open("x"))',
        'a = [x for x in (1, 2)]',
        'a.b = 1',
        'a = {**dict(b=1)}',
        'a = f"{1}"',
        'a = 1 +',
    ],
)
def test_refuses_to_run_anything(text):
    with pytest.raises(ValueError, match='the config text'):
        parse_config_text(text)
