# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What we use of MMEngine's internals exists and does what `gplq_mm/compat/mmengine.py` says."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import mmengine
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn

from gplq_mm.compat import mmengine as compat
from gplq_mm.integrations.mm.checkpoints import checkpoint_io  # noqa: F401  lets torch load MMEngine's types


class Scale(BaseModel):
    """One weight, learned to be 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, inputs: list[Tensor], mode: str = 'tensor') -> dict[str, Tensor]:
        return {'loss': (self.weight * torch.stack(inputs)).pow(2).mean()}


class StartFrom(Hook):
    """Names another checkpoint before MMEngine loads one."""

    priority = 'VERY_HIGH'

    def __init__(self, path: str, resume: bool) -> None:
        self.path, self.resume = path, resume

    def before_run(self, runner: Runner) -> None:
        compat.start_from(runner, self.path, self.resume)


class CountedLoop(EpochBasedTrainLoop):
    """A loop whose epochs are counted through `count_epoch`."""

    def run_epoch(self) -> None:
        self.runner.call_hook('before_train_epoch')
        for index, batch in enumerate(self.dataloader):
            self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        compat.count_epoch(self)


_names = iter(range(10**6))


def make_runner(work_dir: Path, **options: Any) -> Runner:
    data = [{'inputs': torch.ones(1)}] * 4
    return Runner(
        model=Scale(),
        work_dir=str(work_dir),
        experiment_name=f'test_compat_{next(_names)}',
        train_dataloader=dict(
            dataset=data, sampler=dict(type='DefaultSampler', shuffle=False), batch_size=2
        ),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        train_cfg=dict(type=CountedLoop, max_epochs=2),
        log_level='ERROR',
        **options,
    )


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return make_runner(tmp_path)


@pytest.mark.parametrize(
    'name', ['_train_loop', '_val_loop', '_test_loop', '_resume', '_load_from']
)
def test_runner_still_has(runner: Runner, name: str) -> None:
    assert hasattr(runner, name), message('Runner', name)


def test_loop_still_has_epoch(runner: Runner) -> None:
    assert hasattr(runner.train_loop, '_epoch'), message('EpochBasedTrainLoop', '_epoch')


def test_optim_wrapper_still_has_accumulative_counts() -> None:
    wrapper = wrapper_of(3)
    assert hasattr(wrapper, '_accumulative_counts'), message('OptimWrapper', '_accumulative_counts')
    assert compat.accumulated_batches(wrapper) == 3
    assert compat.accumulated_batches(wrapper_of(1)) == 1


def test_config_still_has_is_lazy_import(tmp_path: Path) -> None:
    assert hasattr(Config, '_is_lazy_import'), message('Config', '_is_lazy_import')
    lazy, text = tmp_path / 'lazy.py', tmp_path / 'text.py'
    lazy.write_text('from mmengine.config import read_base\nwith read_base():\n    pass\n')
    text.write_text("_base_ = './other.py'\n")
    assert compat.is_lazy_config(str(lazy))
    assert not compat.is_lazy_config(str(text))


def test_history_buffer_still_has_statistics_methods() -> None:
    buffer = HistoryBuffer([1.0, 3.0], [1, 1])
    assert hasattr(buffer, '_statistics_methods'), message('HistoryBuffer', '_statistics_methods')
    statistics = compat.history_statistics()
    assert statistics['mean'](buffer) == 2.0
    again = pickle.loads(pickle.dumps(buffer))
    assert set(again._statistics_methods) == set(statistics)


def test_train_loop_is_none_until_it_is_built(runner: Runner) -> None:
    assert compat.train_loop(runner) is None
    built = runner.train_loop
    assert compat.train_loop(runner) is built
    assert compat.built_loops(runner) == {'train': built}


def test_count_epoch_ends_a_training(runner: Runner) -> None:
    runner.train()
    assert (runner.epoch, runner.iter) == (2, 4)


def test_load_path_and_resume_are_the_configs(tmp_path: Path) -> None:
    plain = make_runner(tmp_path)
    assert (compat.load_path(plain), compat.is_resumed(plain)) == (None, False)
    given = make_runner(tmp_path, load_from='x.pth', resume=True)
    assert (compat.load_path(given), compat.is_resumed(given)) == ('x.pth', True)


@pytest.mark.parametrize('resume', [False, True])
def test_start_from_is_what_the_runner_loads(runner: Runner, resume: bool) -> None:
    with torch.no_grad():
        runner.model.weight.fill_(7.0)
    runner.train()
    trained = float(runner.model.weight.detach())
    again = make_runner(
        Path(runner.work_dir, 'again'),
        custom_hooks=[StartFrom(str(Path(runner.work_dir, 'epoch_2.pth')), resume)],
    )
    loaded: list[float] = []
    again.register_hook(NoteWeight(loaded), priority='VERY_LOW')
    again.train()
    assert loaded == [trained]
    assert again.epoch == 2
    assert (float(again.model.weight.detach()) == trained) is resume  # a resumed run is at its end


class NoteWeight(Hook):
    """Keeps the weight that a training begins with."""

    def __init__(self, kept: list[float]) -> None:
        self.kept = kept

    def before_train(self, runner: Runner) -> None:
        self.kept.append(float(runner.model.weight.detach()))


def test_a_data_set_still_serializes_its_images(tmp_path: Path) -> None:
    assert hasattr(BaseDataset, '_serialize_data'), message('BaseDataset', '_serialize_data')
    path = tmp_path / 'images.json'
    for text, is_empty in (('{"metainfo": {}, "data_list": []}', True), ('{"metainfo"', False)):
        path.write_text(text)
        with pytest.raises(ValueError) as caught:
            BaseDataset(str(path))
        assert compat.is_empty_data_set(caught.traceback[-1].frame.raw) is is_empty


def wrapper_of(batches: int) -> OptimWrapper:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    return OptimWrapper(optimizer, accumulative_counts=batches)


def message(owner: str, name: str) -> str:
    version = mmengine.__version__
    return f'MMEngine {version} has no {owner}.{name}: change gplq_mm/compat/mmengine.py'


def test_a_brief_runner_has_the_long_texts_in_its_file_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert hasattr(Runner, '_log_env'), message('Runner', '_log_env')
    name = f'test_compat_{next(_names)}'
    cfg = Config(dict(a=1))
    make = compat.brief_runner()
    runner = make(model=Scale(), work_dir=str(tmp_path), experiment_name=name, cfg=cfg)
    runner.logger.info('a line of the run')
    output = ''.join(capfd.readouterr())
    (log,) = tmp_path.rglob('*.log')
    for long in ('System environment:', 'Config:', 'Hooks will be executed'):
        assert long in log.read_text()
        assert long not in output
    assert 'a line of the run' in output
