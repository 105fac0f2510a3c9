# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import os
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from gplq_mm.__main__ import main
from tests.helpers.tiny_projects import TinyProject, make_project

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')


def save_random(project: TinyProject) -> None:
    """A checkpoint `float.pth` of the project's model, untrained."""
    cfg = Config.fromfile(project.config)
    with DefaultScope.overwrite_default_scope(project.library):
        model = MODELS.build(cfg.model)
    torch.save(dict(state_dict=model.state_dict()), project.root / 'float.pth')


@pytest.fixture(scope='module')
def classifier(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    project = make_project(tmp_path_factory.mktemp('classifier'), 'vit_classifier')
    save_random(project)
    return project


@pytest.fixture(autouse=True)
def here(classifier: TinyProject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(classifier.root)


def init(*words: str) -> int:
    return main(['init', *words])


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line in which `init` refuses."""
    with pytest.raises(SystemExit) as caught:
        init(*words)
    assert caught.value.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith('error: ')
    return lines[-1]


def test_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make_project(tmp_path / 'p', 'mask_rcnn_swin')
    save_random(project)
    monkeypatch.chdir(project.root)
    out = tmp_path / 'elsewhere' / 'deep' / 'gplq.py'
    assert init(str(project.config), '--checkpoint', 'float.pth', '-o', str(out)) == 0
    cfg, theirs = Config.fromfile(out), Config.fromfile(project.config)
    assert len(out.read_text().splitlines()) <= 15
    assert 'import' not in out.read_text()
    assert (cfg.model.type, cfg.model.float_type) == ('gplq_mm.GPLQ', 'MaskRCNN')
    assert cfg.model.recipe == dict(base='w4a4')
    assert cfg.model.backbone == theirs.model.backbone
    assert cfg.train_dataloader == theirs.train_dataloader
    assert cfg.load_from == 'float.pth'
    loop = dict(type='gplq_mm.ResumableEpochLoop', max_epochs=1, val_interval=1)
    assert cfg.train_cfg == loop  # a kill within the epoch loses a tenth of it at most
    hook = dict(type='CheckpointHook', by_epoch=False, interval=2, max_keep_ckpts=2)
    assert {k: cfg.default_hooks.checkpoint[k] for k in hook} == hook  # 18 iterations
    assert cfg.optim_wrapper == dict(constructor='gplq_mm.GPLQOptimWrapperConstructor')
    assert cfg.custom_hooks == [dict(type='gplq_mm.GPLQHook')]


def test_own_hooks_and_work_dir(classifier: TinyProject, tmp_path: Path) -> None:
    config = classifier.config.with_name('own.py')
    config.write_text(
        "_base_ = './vit_classifier.py'\ncustom_hooks = [dict(type='NumClassCheckHook')]\n"
        "work_dir = 'runs/float'\n"
    )
    out = tmp_path / 'out.py'
    words = (str(config), '--checkpoint', 'float.pth', '--recipe', 'w3a3', '-o', str(out))
    assert init(*words) == 0
    cfg = Config.fromfile(out)
    own = dict(type='NumClassCheckHook')
    assert cfg.custom_hooks == [own, dict(type='gplq_mm.GPLQHook')]
    assert cfg.work_dir == 'work_dirs/out'
    assert cfg.model.recipe == dict(base='w3a3')


def test_iteration_based_loop(classifier: TinyProject, tmp_path: Path) -> None:
    config = classifier.config.with_name('iters.py')
    loop = "dict(_delete_=True, type='IterBasedTrainLoop', max_iters=99, val_interval=9)"
    config.write_text(f"_base_ = './vit_classifier.py'\ntrain_cfg = {loop}\n")
    out = tmp_path / 'out.py'
    assert init(str(config), '--checkpoint', 'float.pth', '-o', str(out)) == 0
    cfg = Config.fromfile(out)
    assert cfg.train_cfg == dict(type='IterBasedTrainLoop', max_iters=200, val_interval=200)
    assert 'one epoch has 10' in out.read_text()
    assert cfg.param_scheduler == [dict(type='CosineAnnealingLR', by_epoch=False)]
    assert cfg.default_hooks.checkpoint.interval == 20


def test_a_loop_of_the_project_stays(classifier: TinyProject, tmp_path: Path) -> None:
    config = classifier.config.with_name('loop.py')
    loop = "dict(_delete_=True, type='mine.Loop', max_epochs=9, val_interval=3)"
    config.write_text(f"_base_ = './vit_classifier.py'\ntrain_cfg = {loop}\n")
    out = tmp_path / 'out.py'
    words = ('--checkpoint', 'float.pth', '--recipe', 'gplq_w4a4_paper', '-o', str(out))
    assert init(str(config), *words) == 0
    cfg = Config.fromfile(out)
    assert cfg.train_cfg == dict(type='mine.Loop', max_epochs=1, val_interval=1)
    assert cfg.default_hooks.checkpoint == Config.fromfile(config).default_hooks.checkpoint


@pytest.mark.parametrize(
    ('recipe', 'batch', 'there', 'epochs'),
    [
        ('w4a4', 2, True, 20),  # 40 images
        ('w4a4', 4, True, 20),  # the most
        ('w3a3', 1, True, 10),
        ('gplq_w4a4_paper', 4, True, 1),  # a learning rate given as a number keeps its epoch
        ('w4a4', 4, False, 1),
    ],
)
def test_a_classifier_with_few_images_sees_them_more_than_once(
    classifier: TinyProject, tmp_path: Path, recipe: str, batch: int, there: bool, epochs: int
) -> None:
    config, out = classifier.config.with_name('few.py'), tmp_path / 'out.py'
    where = '' if there else ", dataset=dict(data_root='nowhere')"
    config.write_text(
        f"_base_ = './vit_classifier.py'\ntrain_dataloader = dict(batch_size={batch}{where})\n"
    )
    assert init(str(config), '--checkpoint', 'float.pth', '--recipe', recipe, '-o', str(out)) == 0
    cfg = Config.fromfile(out)
    assert cfg.train_cfg.max_epochs == cfg.train_cfg.val_interval == epochs
    iterations = -(-40 // batch) * epochs
    expected = (epochs, -(-iterations // 10)) if there else (1, 1000)
    assert (cfg.train_cfg.max_epochs, cfg.default_hooks.checkpoint.interval) == expected
    unread = 'more if an epoch has far fewer than 390' in out.read_text()
    assert unread == (not there and recipe == 'w4a4')


@pytest.mark.parametrize(
    ('kind', 'why'),
    [('CIFAR10', 'RuntimeError'), ('MNIST', 'RuntimeError'), ('SetOfTheirs', 'KeyError')],
)
def test_a_training_set_that_cannot_be_read_is_neither_downloaded_nor_a_failure(
    classifier: TinyProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, why: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError('downloads')

    for module in ('cifar', 'mnist'):
        monkeypatch.setattr(f'mmpretrain.datasets.{module}.download_and_extract_archive', refuse)
    config, out = classifier.config.with_name('absent.py'), tmp_path / 'out.py'
    dataset = f"dict(_delete_=True, type='{kind}', data_root='nowhere', split='train', pipeline=[])"
    config.write_text(
        f"_base_ = './vit_classifier.py'\ntrain_dataloader = dict(dataset={dataset})\n"
    )
    assert init(str(config), '--checkpoint', 'float.pth', '-o', str(out)) == 0
    assert Config.fromfile(out).train_cfg.max_epochs == 1
    assert f'training set not read ({why})' in out.read_text()
    assert not (classifier.root / 'nowhere').exists()


def test_config_of_the_import_style(classifier: TinyProject, tmp_path: Path) -> None:
    config = classifier.config.with_name('lazy.py')
    config.write_text(
        'from mmengine.config import read_base\nfrom mmpretrain.models import ImageClassifier\n'
        'with read_base():\n    from .vit_classifier import *\nmodel.update(type=ImageClassifier)\n'
    )
    out = tmp_path / 'out.py'
    assert init(str(config), '--checkpoint', 'float.pth', '-o', str(out)) == 0
    cfg = Config.fromfile(out)
    assert cfg.model.float_type == 'mmpretrain.models.ImageClassifier'
    assert cfg.model.backbone.arch.num_layers == 2


def test_config_inside_a_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = 'mmpretrain::deit/deit-tiny_4xb256_in1k.py'
    words = (config, '--checkpoint', 'float.pth', '-o', str(tmp_path / 'out.py'))
    assert f'does not fit the model of {config}' in refusal(capsys, *words)


def test_checkpoint_of_another_architecture(
    classifier: TinyProject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load('float.pth', weights_only=True)['state_dict']
    state['head.layers.head.bias'] = torch.zeros(7)
    state['extra'] = state.pop('backbone.ln1.bias')
    torch.save(dict(state_dict=state), tmp_path / 'other.pth')
    out = tmp_path / 'out.py'
    words = (str(classifier.config), '--checkpoint', str(tmp_path / 'other.pth'), '-o', str(out))
    error = refusal(capsys, *words)
    assert '1 missing: backbone.ln1.bias; 1 unexpected: extra' in error
    assert '1 of another shape: head.layers.head.bias' in error
    assert not out.exists()


@pytest.mark.parametrize(
    ('config', 'checkpoint', 'out', 'more', 'says'),
    [
        ('configs/nope.py', 'float.pth', 'o.py', '', 'no config at'),
        ('configs/vit_classifier.py', 'nope.pth', 'o.py', '', '--checkpoint'),
        ('configs/vit_classifier.py', 'float.pth', 'o.yaml', '', 'o.yaml.py'),
        ('configs/vit_classifier.py', 'float.pth', 'o.py', '--recipe w4', 'w4a4'),
        ('configs/vit_classifier.py', 'float.pth', 'there.py', '', '--force'),
        (
            'configs/vit_classifier.py',
            'float.pth',
            'configs/vit_classifier.py',
            '--force',
            'the float config itself',
        ),
        ('gplq.py', 'float.pth', 'o.py', '', 'no float model'),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str],
    config: str,
    checkpoint: str,
    out: str,
    more: str,
    says: str,
) -> None:
    Path('there.py').write_text('mine = 1\n')
    Path('gplq.py').write_text("model = dict(type='gplq_mm.GPLQ')\n")
    before = {path: path.read_text() for path in Path().rglob('*.py')}
    words = (config, '--checkpoint', checkpoint, '-o', out, *more.split())
    assert says in refusal(capsys, *words)
    assert {path: path.read_text() for path in Path().rglob('*.py')} == before


def test_force_overwrites(classifier: TinyProject, tmp_path: Path) -> None:
    out = tmp_path / 'out.py'
    out.write_text('mine = 1\n')
    config = os.path.relpath(classifier.config)
    assert init(config, '--checkpoint', 'float.pth', '-o', str(out), '--force') == 0
    assert 'mine' not in Config.fromfile(out)


def test_what_would_spoil_one_epoch_is_left_out(classifier: TinyProject, tmp_path: Path) -> None:
    config = classifier.config.with_name('regularised.py')
    config.write_text(
        "_base_ = './vit_classifier.py'\n"
        "custom_hooks = [dict(type='EMAHook', momentum=1e-4), dict(type='NumClassCheckHook')]\n"
        "model = dict(train_cfg=dict(augments=dict(type='Mixup', alpha=0.8)))\n"
        'auto_scale_lr = dict(base_batch_size=1024)\n'
    )
    out = tmp_path / 'out.py'
    assert init(str(config), '--checkpoint', 'float.pth', '-o', str(out)) == 0
    cfg = Config.fromfile(out)
    hooks = [dict(type='NumClassCheckHook'), dict(type='gplq_mm.GPLQHook')]
    assert cfg.custom_hooks == hooks
    assert cfg.model.train_cfg is None and cfg.model.float_type == 'ImageClassifier'
    assert cfg.auto_scale_lr == dict(base_batch_size=128)
    assert '# no EMAHook: ' in out.read_text()
