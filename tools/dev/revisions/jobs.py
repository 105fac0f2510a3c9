# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The jobs that both revisions run, and which of their files are compared.

Jobs use what stays the same from revision to revision: tools and their arguments, config names,
checkpoint and report keys, the functions of `gplq_mm`. They import no module of the package.
"""

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONFIG = """
_base_ = './{base}.py'
load_from = 'float.pth'
model = dict(type='gplq_mm.GPLQ', float_type='{float_type}', recipe={recipe}, engine='{engine}')
custom_hooks = [dict(type='gplq_mm.GPLQHook')]
train_cfg = dict(max_epochs=1, val_interval=1)
optim_wrapper = dict(_delete_=True, constructor='gplq_mm.GPLQOptimWrapperConstructor')
param_scheduler = []
randomness = dict(seed=3)
default_hooks = dict(logger=dict(type='LoggerHook', interval=1))
log_processor = dict(type='LogProcessor', window_size=1, by_epoch=True)
"""
RECIPE = "dict(base='{}', calibration=dict(num_images=4))"
FLOAT = {
    'vit': ('vit_classifier', 'ImageClassifier'),
    'swin': ('swin_classifier', 'ImageClassifier'),
    'detector': ('mask_rcnn_swin', 'MaskRCNN'),
    'vit-detector': ('mask_rcnn_vit', 'MaskRCNN'),
}
"""Project -> its float config among the tests' configs, and the class of its model."""
CONFIGS = {
    'vit': {
        'fused': (RECIPE.format('w4a4'), 'fused'),
        'reference': (RECIPE.format('gplq_w4a4_paper'), 'reference'),
    },
    'swin': {'fused': (RECIPE.format('w3a3'), 'fused')},
    'detector': {'fused': (RECIPE.format('w4a4'), 'fused')},
    'vit-detector': {'fused': (RECIPE.format('w4a4'), 'fused')},
}
"""Project -> name of a GPLQ config -> recipe, engine."""
RUN_FILES = (
    '{}/2*/vis_data/scalars.json',
    '{}/gplq_calibrated.pth#scales',
    '{}/gplq_calibrated.pth',
    '{}/epoch_1.pth',
    '{}/gplq_stage1.pth',
    '{}/gplq_final.pth',
    '{}/gplq_report.json',
)
"""What a training leaves: loss of each iteration, checkpoint of each stage, final metrics."""


@dataclass(frozen=True)
class Job:
    """One process in each revision.

    Attributes:
        name: For the table and `--jobs`.
        command: Arguments of Python, run in the folder of the project. `{tree}` is the
            revision's folder, `{here}` that of these scripts.
        project: Folder in which it runs; one of `FLOAT`, or a folder that holds nothing.
        files: Patterns of the files that are compared, relative to the project.
        needs: Name of the job whose files it reads.
    """

    name: str
    command: tuple[str, ...]
    project: str
    files: tuple[str, ...]
    needs: str = ''


def _train(project: str, config: str) -> Job:
    command = ('{tree}/tools/train.py', f'configs/{config}.py', '--work-dir', config)
    files = tuple(file.format(config) for file in RUN_FILES)
    return Job(f'{project}-{config}', command, project, files)


def _test(project: str) -> Job:
    command = ('{tree}/tools/test.py', 'configs/fused.py', 'fused/gplq_final.pth')
    out = ('--work-dir', 'test', '--out', 'predictions.pkl')
    files = ('predictions.pkl', 'test/2*/2*.json')
    return Job(f'{project}-test', (*command, *out), project, files, needs=f'{project}-fused')


_PTQ = ('mse', 'repq+gptq', 'gptq+bias_correction')
JOBS = (
    Job('recipes', ('{here}/recipe_texts.py', 'recipes.json'), 'recipes', ('recipes.json',)),
    Job('torch', ('{here}/torch_only.py', 'torch.pth'), 'torch', ('torch.pth',)),
    _train('vit', 'fused'),
    _train('vit', 'reference'),
    _test('vit'),
    Job(
        'vit-ptq',
        (
            '{tree}/tools/ptq.py',
            'configs/fused.py',
            'fused/gplq_stage1.pth',
            *('--work-dir', 'ptq', '--ptq', *_PTQ),
        ),
        'vit',
        ('ptq/gplq_stage2.json', *(f'ptq/gplq_final_{name}.pth' for name in _PTQ)),
        needs='vit-fused',
    ),
    Job(
        'vit-sensitivity',
        (
            '{tree}/tools/sensitivity.py',
            'configs/fused.py',
            'float.pth',
            *('--calibrate', '--bits', '2', '4', '--num-images', '4'),
            *('--mean-weight-bits', '3', '--work-dir', 'sensitivity'),
        ),
        'vit',
        ('sensitivity/sensitivity.json', 'sensitivity/mixed_recipe.py'),
    ),
    _train('swin', 'fused'),
    _train('detector', 'fused'),
    _test('detector'),
    _train('vit-detector', 'fused'),
)
"""In the order in which each revision runs them."""
