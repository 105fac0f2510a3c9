# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Write `tests/checkpoints`: small checkpoints of every stage, which later code has to load.

Run it for a new kind of checkpoint only. The files that are there stand for those that users
have: they are not written anew because the code has changed.

Example:
    python tools/dev/write_checkpoint_fixtures.py detector
"""

import hashlib
import json
import lzma
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the tests' tiny projects

import gplq_mm
from tests.helpers.checkpoint_fixtures import FOLDER, NETWORKS, codes_of, layers_of, unpacked
from tests.helpers.gplq_runs import train, write_gplq_config
from tests.helpers.plain_vit import pixels, plain_vit
from tests.helpers.tiny_projects import make_project, train_float

ROOT = Path(__file__).resolve().parents[2]
STAGES = {
    'calibrated': 'gplq_calibrated.pth',
    'stage1': 'gplq_stage1.pth',
    'final': 'gplq_final.pth',
}


def store(content: dict[str, Any], name: str, folder: Path) -> None:
    """Compress a checkpoint into the folder of fixtures."""
    path = folder / 'fixture.pth'
    torch.save(content, path)
    target = FOLDER / f'{name}.pth.xz'
    target.write_bytes(lzma.compress(path.read_bytes(), preset=9))
    print(f'{target.relative_to(ROOT)}: {target.stat().st_size} bytes', flush=True)


def digests_of(name: str, folder: Path) -> dict[str, str]:
    """SHA-256 of each layer's weight codes in a stored checkpoint; none before stage 2."""
    state: dict[str, Tensor]
    state = torch.load(unpacked(name, folder), weights_only=False)['state_dict']
    return {
        layer: hashlib.sha256(codes_of(state, layer).numpy().tobytes()).hexdigest()
        for layer in layers_of(state)
        if bool(state[f'{layer}.weight_quantizer.calibrated'])
    }


def write_runs(name: str, folder: Path) -> None:
    """Checkpoints of a run of MMEngine."""
    base, text = NETWORKS[name]
    project = make_project(folder / name, base)
    small = project.config.with_name('small.py')
    small.write_text(f"_base_ = './{base}.py'\n{text}", encoding='utf-8')
    project = type(project)(project.root, small, project.library)
    shutil.copy(train_float(project), project.root / 'float.pth')
    config = write_gplq_config(project, Path('float.pth'))
    work_dir = train(project, config, 'run')
    for stage, file in STAGES.items():
        content = torch.load(work_dir / file, map_location='cpu', weights_only=False)
        content['gplq']['float_checkpoint']['path'] = 'float.pth'
        store(content, f'{name}_{stage}', folder)


def write_plain(folder: Path) -> None:
    """Files of `gplq_mm.save`."""
    model, teacher, x = plain_vit(), plain_vit(), pixels()

    def save(stage: str) -> None:
        path = folder / 'saved.pth'
        gplq_mm.save(model, path)
        content = torch.load(path, weights_only=True)
        store(content, f'plain_{stage}', folder)

    gplq_mm.quantize(model, dict(base='w4a4', calibration=dict(num_images=16)))
    gplq_mm.calibrate(model, x.split(4))
    save('calibrated')
    pairs = [(part, part.mean((1, 2, 3)).gt(0).long()) for part in x.split(4)]
    gplq_mm.train_stage1(model, teacher, pairs)
    save('stage1')
    gplq_mm.quantize_weights(model, x.split(4))
    save('final')


def main(names: Sequence[str]) -> None:
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in names or ('plain', *NETWORKS):
            write_plain(folder) if name == 'plain' else write_runs(name, folder)
        stored = sorted(path.name.removesuffix('.pth.xz') for path in FOLDER.glob('*.xz'))
        digests = {name: digests_of(name, folder) for name in stored}
    text = json.dumps(digests, indent=1) + '\n'
    (FOLDER / 'weight_codes.json').write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main(sys.argv[1:])
