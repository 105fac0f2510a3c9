# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import re
from pathlib import Path

import pytest
from mmengine.config import Config

from gplq_mm.integrations.mm.launch.errors import ConfigError
from gplq_mm.ptq.labels import parse_ptq, ptq_label
from tests.helpers.tools import load_tool

pytest.importorskip('mmcv')
ptq = load_tool('ptq')
GPLQ = Config(dict(model=dict(type='gplq_mm.GPLQ'), work_dir='w'))


@pytest.mark.parametrize(
    ('words', 'algorithms', 'files'),
    [
        ('', [None], ['w/gplq_final.pth']),
        ('--ptq mse', ['mse'], ['w/gplq_final.pth']),
        ('--ptq mse --out o.pth', ['mse'], ['o.pth']),
        (
            '--ptq mse minmax',
            ['mse', 'minmax'],
            ['w/gplq_final_mse.pth', 'w/gplq_final_minmax.pth'],
        ),
    ],
)
def test_one_final_checkpoint_an_algorithm(
    words: str, algorithms: list[str | None], files: list[str]
) -> None:
    args = ptq.parse_args(['c.py', 'x.pth', *words.split()])
    assert args.ptq == algorithms
    assert [ptq.final_name(args, GPLQ, name) for name in args.ptq] == files


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('gptq(0.1)', 'is no algorithm; write NAME'),
        ('gptq+', 'is no algorithm'),
        ('gptq(damping=f(1))', 'is no algorithm'),
        ('gptq(dampling=0.1)', "does not take the options {'dampling': 0.1}"),
        ('gptqq', "did you mean 'gptq'"),
        ('bias_correction', 'none of these rounds weights'),
    ],
)
def test_a_wrong_algorithm_is_refused(text: str, message: str) -> None:
    args = ptq.parse_args(['c.py', 'x.pth', '--ptq', text])
    with pytest.raises(ConfigError, match=re.escape(message)):
        ptq.check(GPLQ, args)


def test_an_algorithm_may_have_options() -> None:
    text = "repq(strength=0.5)+gptq(asymmetric=True,range='hessian')"
    assert parse_ptq(text) == [
        dict(type='repq', strength=0.5),
        dict(type='gptq', asymmetric=True, range='hessian'),
    ]
    assert ptq_label(parse_ptq(text)) == text
    several = "gptq+global(lr=1e-2)+qwt(blocks=['a+b'])"
    assert parse_ptq(several) == [
        'gptq', dict(type='global', lr=0.01), dict(type='qwt', blocks=['a+b'])
    ]  # fmt: skip


def test_a_float_config_is_refused() -> None:
    args = ptq.parse_args(['c.py', 'x.pth'])
    with pytest.raises(ConfigError, match=r'c\.py has no model of type gplq_mm\.GPLQ'):
        ptq.check(Config(dict(model=dict(type='MaskRCNN'))), args)


def test_one_out_file_for_two_algorithms_is_refused() -> None:
    args = ptq.parse_args(['c.py', 'x.pth', '--ptq', 'mse', 'minmax', '--out', 'o.pth'])
    with pytest.raises(ConfigError, match='--out names one file'):
        ptq.check(GPLQ, args)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    args = ptq.parse_args(['c.py', str(tmp_path / 'x.pth')])
    with pytest.raises(ConfigError, match=str(tmp_path / 'x.pth')):
        ptq.check(GPLQ, args)
