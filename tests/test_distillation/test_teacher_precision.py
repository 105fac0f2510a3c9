# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import torch
from torch import nn

from gplq_mm.distillation.teacher_precision import as_float, teacher_dtype, teacher_precision

CPU = torch.device('cpu')


def test_types() -> None:
    assert teacher_dtype('auto', CPU) == torch.float32
    assert teacher_dtype('bfloat16', CPU) == torch.bfloat16


def test_products_run_in_it_and_what_comes_out_is_float() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    with teacher_precision(torch.bfloat16, CPU):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    found = as_float({'a': (out, [out]), 'b': 1})
    assert found['a'][0].dtype == found['a'][1][0].dtype == torch.float32 and found['b'] == 1
    torch.testing.assert_close(found['a'][0], layer(x), rtol=0.02, atol=0.02)


def test_float32_and_a_running_autocast_stay() -> None:
    with teacher_precision(torch.float32, CPU):
        assert not torch.is_autocast_enabled('cpu')
    with torch.autocast('cpu', torch.float16), teacher_precision(torch.bfloat16, CPU):
        assert torch.get_autocast_dtype('cpu') == torch.float16
