# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import itertools

import pytest
import torch

from gplq_mm.quantizers.fake_quantizer import Grid, quantize_packed
from gplq_mm.quantizers.packing import cpu_kernels
from gplq_mm.quantizers.packing.c_library import SWITCH
from gplq_mm.quantizers.packing.codes import packed_backward


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No library loaded, an empty cache."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    cpu_kernels.load.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    cpu_kernels.load.cache_clear()


@pytest.mark.parametrize('compiler', ['no-such-compiler', 'false'])
def test_without_a_working_compiler_torch_does_it(fresh, monkeypatch, compiler) -> None:
    monkeypatch.setenv('CC', compiler)
    kernels, description = cpu_kernels.load()
    assert kernels is None
    assert description.startswith('passes in torch') and compiler in description
    values, _ = quantize_packed(torch.tensor([0.6]), torch.tensor(0.5), Grid(-8, 7, 0.0))
    assert values.tolist() == [0.5]


def test_switch(fresh, monkeypatch) -> None:
    monkeypatch.setenv(SWITCH, '0')
    assert cpu_kernels.load() == (None, 'passes in torch (GPLQ_CPU_KERNELS=0)')


def test_library_is_compiled_once(fresh) -> None:
    if cpu_kernels.load()[0] is None:
        pytest.skip(cpu_kernels.load()[1])
    built = list((fresh / 'gplq_mm').iterdir())
    assert len(built) == 1 and built[0].suffix == '.so'
    before = built[0].stat().st_mtime_ns
    cpu_kernels.load.cache_clear()
    assert cpu_kernels.load()[1] == 'passes compiled from C'
    assert built[0].stat().st_mtime_ns == before


def test_several_threads_give_the_same() -> None:
    x = torch.randn(300_001, generator=torch.Generator().manual_seed(0))
    scale, grid = torch.tensor(0.3), Grid(-8, 7, 2.0)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            values, packed = quantize_packed(x, scale, grid)
            found.append([values, *packed, *packed_backward(packed, x.clone(), scale, grid, True)])
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*found, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-5, atol=0)
    assert all(map(torch.equal, found[0][:3], found[1][:3]))


def test_other_devices_and_types_are_left_to_torch() -> None:
    assert cpu_kernels.kernels_for(torch.zeros(1, dtype=torch.float64)) is None
    assert cpu_kernels.kernels_for(torch.zeros(1, device='meta')) is None


@pytest.mark.parametrize('shape', [(2, 3, 7, 5), (1, 3, 7, 5), (2, 1, 1, 5), (1, 1, 1, 1)])
def test_a_layout_finds_the_scale_of_every_element(shape) -> None:
    kept = itertools.product([False, True], repeat=4)
    for order, has_scales in itertools.product(itertools.permutations(range(4)), kept):
        back = sorted(range(4), key=order.__getitem__)
        x = torch.empty([shape[d] for d in order]).permute(back)
        of_scale = [n if has else 1 for n, has in zip(shape, has_scales, strict=True)]
        scale = torch.rand(of_scale)
        if not cpu_kernels.fits(x, scale):
            assert cpu_kernels.kernels_for(x, scale) is None
            continue
        layout = cpu_kernels._Layout(x, scale, Grid(-8, 7, 0.0))
        groups, outer, channels, inner = layout.around
        assert groups * outer * channels * inner == x.numel()
        assert groups == 1 or inner == 1
        seen = layout._scale.view(groups, 1, channels, 1)
        seen = seen.expand(layout.around).flatten()
        expected = scale.expand(shape).permute(order).flatten()
        assert torch.equal(seen, expected), (order, of_scale)
        sums = torch.rand(groups, 2, channels, 3, dtype=torch.float64)
        total = layout.total(sums)
        assert total.shape == scale.shape
        assert torch.equal(
            layout._in_memory_order(total).flatten(), sums.sum((1, 3)).float().flatten()
        )


@pytest.mark.parametrize('axis', [-1, -2])
def test_a_scale_a_vector_of_attention_always_fits(axis) -> None:
    shape = (2, 3, 7, 5)
    scale = torch.rand([1 if d == 4 + axis else n for d, n in enumerate(shape)])
    for order in itertools.permutations(range(4)):
        back = sorted(range(4), key=order.__getitem__)
        assert cpu_kernels.fits(torch.empty([shape[d] for d in order]).permute(back), scale)


@pytest.mark.parametrize('axis', [-1, -2])
def test_several_threads_give_the_same_with_a_scale_a_vector(axis) -> None:
    x = torch.randn(3, 2, 211, 64, generator=torch.Generator().manual_seed(0))
    scale = x.abs().amax(axis, keepdim=True) / 7
    grid, threads, found = Grid(-8, 7, 0.0, 0.5), torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            values, packed = quantize_packed(x, scale, grid)
            found.append([values, *packed, *packed_backward(packed, x.clone(), scale, grid, True)])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))
