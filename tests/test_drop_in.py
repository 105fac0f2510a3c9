# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A project that knows nothing of this package: the libraries' own tools and APIs run GPLQ."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.fileio import load

from tests.helpers.tiny_projects import (
    TinyProject,
    make_project,
    run_ok,
    run_python,
    stock_tool,
    train_float,
)

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')

METRIC = {'mmdet': 'coco/segm_mAP', 'mmpretrain': 'accuracy/top1'}

# What a user of the library writes, for (config, checkpoint): the quantized model, the same weights
# in the float model, and the quantized model with float weights, which must be refused.
DETECTION_APIS = """
import json, sys
from mmdet.apis import DetInferencer, inference_detector, init_detector

def predict(config, checkpoint):
    model = init_detector(config, checkpoint, device='cpu')
    found = inference_detector(model, image).pred_instances
    return dict(types=[t.__name__ for t in type(model).__mro__], masks=int(found.masks.sum()),
                classes=list(model.dataset_meta['classes']),
                labels=found.labels.tolist(), scores=found.scores.tolist())

def infer(config, checkpoint):
    inferencer = DetInferencer(config, checkpoint, device='cpu', show_progress=False)
    (found,) = inferencer(image, no_save_vis=True)['predictions']
    return dict(labels=found['labels'], scores=found['scores'])
"""
CLASSIFICATION_APIS = """
import json, sys
from mmpretrain import ImageClassificationInferencer, get_model

def predict(config, checkpoint):
    model = get_model(config, pretrained=checkpoint)
    (found,) = ImageClassificationInferencer(model)(image)
    return dict(types=[t.__name__ for t in type(model).__mro__],
                labels=[int(found['pred_label'])], scores=[float(found['pred_score'])])

def infer(config, checkpoint):
    (found,) = ImageClassificationInferencer(config, pretrained=checkpoint)(image)
    return dict(labels=[int(found['pred_label'])], scores=[float(found['pred_score'])])
"""
ASK = """
image, config, float_config, checkpoint, float_checkpoint = sys.argv[1:]
answer = dict(quantized=predict(config, checkpoint), inferencer=infer(config, checkpoint),
              unquantized=predict(float_config, checkpoint))
try:
    predict(config, float_checkpoint)
except Exception as error:
    answer['refusal'] = type(error).__name__
print('ANSWER' + json.dumps(answer))
"""


@dataclass(frozen=True)
class Finished:
    """A project whose model was trained in float, then quantized by the library's own tool."""

    project: TinyProject
    config: Path
    float_checkpoint: Path
    log: str

    @property
    def work_dir(self) -> Path:
        return self.project.root / 'work_dirs' / self.config.stem

    @property
    def final(self) -> Path:
        return self.work_dir / 'gplq_final.pth'

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.work_dir / 'gplq_report.json').read_text())

    @property
    def image(self) -> Path:
        """First validation image."""
        is_detection = self.project.library == 'mmdet'
        name = 'shapes/val/val_0.png' if is_detection else 'shapes_folder/val/disc/0.png'
        return self.project.root / 'data' / name


@pytest.fixture(scope='module', params=['mask_rcnn_swin', 'vit_classifier'])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    project = make_project(tmp_path_factory.mktemp('theirs'), request.param)
    checkpoint = train_float(project, epochs=2)
    config = project.root / 'quantized' / 'w4a4.py'
    words = ('init', project.config, '--checkpoint', checkpoint, '-o', config)
    run_ok('-m', 'gplq_mm', *words, cwd=project.root)
    log = run_ok(stock_tool(project.library, 'train'), config, cwd=project.root)
    return Finished(project, config, checkpoint, log)


@pytest.fixture(scope='module')
def tested(finished: Finished) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics, and prediction on the first image, by the library's own test tool."""
    root, library = finished.project.root, finished.project.library
    words = (finished.config, finished.final, '--work-dir', 'tested', '--out', 'dumped.pkl')
    run_ok(stock_tool(library, 'test'), *words, cwd=root)
    scores = [json.loads(path.read_text()) for path in (root / 'tested').rglob('*.json')]
    samples = load(root / 'dumped.pkl')
    (sample,) = [x for x in samples if root / x['img_path'] == finished.image]
    return next(score for score in scores if METRIC[library] in score), sample


@pytest.fixture(scope='module')
def answer(finished: Finished) -> dict[str, Any]:
    """Predictions on the first image by the library's inference APIs."""
    apis = DETECTION_APIS if finished.project.library == 'mmdet' else CLASSIFICATION_APIS
    configs = (finished.config, finished.project.config)
    words = (finished.image, *configs, finished.final, finished.float_checkpoint)
    output = run_ok('-c', apis + ASK, *words, cwd=finished.project.root)
    line = next(x for x in output.splitlines() if x.startswith('ANSWER'))
    return json.loads(line.removeprefix('ANSWER'))


def test_the_config_names_no_import(finished: Finished) -> None:
    text = finished.config.read_text()
    assert 'import' not in text
    assert len(text.splitlines()) <= 15
    assert Config.fromfile(finished.config).get('custom_imports') is None


def test_stock_train_runs_both_stages(finished: Finished) -> None:
    metric = METRIC[finished.project.library]
    assert finished.final.is_file()
    assert (finished.work_dir / 'gplq_stage1.pth').is_file()
    scores = [finished.report[stage]['metrics'][metric] for stage in ('fp32', 'stage1', 'stage2')]
    assert min(scores) > 0.1  # a model that learned: the comparisons below mean something
    assert 'W4A4' in finished.log


def test_stock_test_scores_the_reported_figure(
    finished: Finished, tested: tuple[dict[str, float], dict[str, Any]]
) -> None:
    assert tested[0].items() >= finished.report['stage2']['metrics'].items()


def test_apis_predict_what_stock_test_predicts(
    finished: Finished, tested: tuple[dict[str, float], dict[str, Any]], answer: dict[str, Any]
) -> None:
    sample = tested[1]
    if finished.project.library == 'mmdet':
        found = sample['pred_instances']
        labels, scores = found['labels'].tolist(), found['scores'].tolist()
    else:
        labels, scores = [int(sample['pred_label'])], [float(sample['pred_score'].max())]
    assert len(labels) > 0
    for api in ('quantized', 'inferencer'):
        assert answer[api]['labels'] == labels
        assert answer[api]['scores'] == pytest.approx(scores, abs=1e-6)


def test_apis_load_a_model_of_the_float_class(finished: Finished, answer: dict[str, Any]) -> None:
    assert finished.project.float_type in answer['quantized']['types']
    if finished.project.library == 'mmdet':
        assert answer['quantized']['classes'] == ['disc', 'box']
        assert answer['quantized']['masks'] > 0


def test_apis_quantize(answer: dict[str, Any]) -> None:
    assert answer['quantized']['scores'] != answer['unquantized']['scores']


def test_a_float_checkpoint_is_refused(finished: Finished, answer: dict[str, Any]) -> None:
    assert answer['refusal'] == 'UncalibratedError'
    words = (finished.config, finished.float_checkpoint, '--work-dir', 'refused')
    tool = stock_tool(finished.project.library, 'test')
    done = run_python(tool, *words, cwd=finished.project.root)
    assert done.returncode != 0
    assert 'never calibrated' in done.stderr
