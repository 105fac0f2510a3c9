# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The worked example of docs/deployment.md, line by line, on a small detector."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from mmengine.fileio import load

from tests.helpers.tiny_projects import REPOSITORY, make_project, our_tool, run_ok, train_float

for _package in ('mmdet', 'onnx', 'onnxscript', 'openvino'):
    pytest.importorskip(_package)

HEADING = '## From a trained Mask R-CNN to OpenVINO in six commands'
METRICS = ('bbox_mAP', 'segm_mAP')


def commands() -> list[list[str]]:
    """Arguments of each command, without `python`."""
    text = (REPOSITORY / 'docs' / 'deployment.md').read_text(encoding='utf-8')
    block = re.search(re.escape(HEADING) + r'.*?```\n(.*?)```', text, re.DOTALL)
    assert block is not None
    return [shlex.split(line)[1:] for line in block[1].splitlines()]


def metrics_of(output: str) -> dict[str, float]:
    """Last printed value of each metric."""
    found = {name: re.findall(rf'coco/{name}: ([\d.-]+)', output) for name in METRICS}
    return {name: float(values[-1]) for name, values in found.items()}


def test_every_command_runs(tmp_path: Path) -> None:
    project = make_project(tmp_path / 'project', 'mask_rcnn_swin')
    shutil.copy(project.config, project.config.with_name('mask_rcnn.py'))
    shutil.copy(train_float(project), project.root / 'float.pth')
    outputs = []
    for command in commands():
        script = Path(command[0])
        if script.parent.name == 'tools':
            command[0] = str(our_tool(script.stem))
        outputs.append(run_ok(*command, cwd=project.root))
    _, _, integer, _, openvino, inspected = outputs
    final = load(project.root / 'work' / 'gplq_report.json')['stage2']['metrics']
    assert metrics_of(integer) == {name: final[f'coco/{name}'] for name in METRICS}
    for name, value in metrics_of(openvino).items():
        assert abs(value - metrics_of(integer)[name]) < 0.1, name
    assert 'int8' in inspected and (project.root / 'detector.bin').is_file()
