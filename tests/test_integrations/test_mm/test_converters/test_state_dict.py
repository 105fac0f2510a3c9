# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch

from gplq_mm.integrations.mm.converters.state_dict import check_state_dict, rename


def test_first_rule_that_fits_wins():
    rules = [(r'^a\.(\d)', r'b.\1'), (r'a', 'c')]
    assert rename('a.1.a', rules) == 'b.1.a'
    assert rename('x.a', rules) == 'x.c'
    assert rename('x', rules) == 'x'


def test_equal_names_and_shapes_pass():
    found = {'a': torch.ones(2)}
    check_state_dict(found, {'a': torch.empty(2, device='meta')})
    assert torch.equal(found['a'], torch.ones(2))


def test_long_lists_are_cut():
    with pytest.raises(ValueError, match=r'15 missing in the checkpoint: k00, k01, .*and 3 more'):
        check_state_dict({}, {f'k{i:02}': torch.ones(1) for i in range(15)})
