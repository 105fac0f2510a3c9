# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The whole way of a model, in a process where torch is all there is."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys

BLOCKED = {'mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'timm', 'torchvision'}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in BLOCKED:
            raise ModuleNotFoundError(f'{name} is blocked', name=name)

sys.meta_path.insert(0, Blocker())
import gplq_mm
assert 'torch' not in sys.modules, '`import gplq_mm` has become heavy'

import copy
import torch
import torch.nn.functional as F
from tests.helpers.plain_vit import plain_vit, pixels

x = pixels(32)
model = plain_vit()
teacher = copy.deepcopy(model)
loader = [(part, part.mean((1, 2, 3)).gt(0).long()) for part in x.split(8)]
assert gplq_mm.quantize(model, 'w4a4').counts == {'linear': 13, 'conv': 1, 'matmul': 4}
assert gplq_mm.calibrate(model, loader).quantizers == 22

mimic = gplq_mm.distill(model, teacher)
optimizer = gplq_mm.stage1_optimizer(model, steps=2)
for inputs, targets in loader[:2]:
    optimizer.zero_grad()
    loss = mimic(inputs) + F.cross_entropy(mimic.output, targets)
    loss.backward()
    optimizer.step()
first, last = gplq_mm.train_stage1(model, teacher, loader, epochs=2)
assert last < first < 10

gplq_mm.quantize_weights(model, loader)
gplq_mm.save(model, sys.argv[1])
loaded = gplq_mm.load(sys.argv[1], plain_vit(seed=5))
with torch.no_grad():
    assert torch.equal(loaded(x), model.eval()(x))
assert not BLOCKED & {name.partition('.')[0] for name in sys.modules}
print('done')
"""


def test_a_model_goes_all_the_way_without_any_other_library(tmp_path) -> None:
    command = [sys.executable, '-W', 'ignore', '-c', SCRIPT, str(tmp_path / 'model.pth')]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['done']
    assert 'stays float' not in done.stderr
