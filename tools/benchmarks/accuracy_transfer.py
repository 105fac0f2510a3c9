# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Transfer of one row of `accuracy.py`: linear probes of its FP32, stage-1 and stage-2 backbones.

`python accuracy_transfer.py JOB.json`, where the job is that of a finished row plus
`transfer_root`, a folder with `train|test/<class>/*`.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

from accuracy_row import row_config
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from gplq_mm.analysis import write_json
from gplq_mm.integrations.mm.checkpoints.checkpoint_io import read_checkpoint
from gplq_mm.integrations.mm.checkpoints.run_checkpoint import FINAL_NAME, STAGE1_NAME, load_float_
from gplq_mm.integrations.mm.launch.tools import run_tool
from gplq_mm.integrations.mm.run.resources import StageMeter
from gplq_mm.integrations.mm.studies.transfer import probe


def probe_data(cfg: Config, root: str) -> Config:
    """Data of the probe: folders of images, short side and centre crop to the backbone's size."""
    size = cfg.model.backbone.get('img_size', 224)
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='ResizeEdge', scale=size, edge='short'),
        dict(type='CenterCrop', crop_size=size),
        dict(type='PackInputs'),
    ]
    loaders = {}
    for name, split in (('train_dataloader', 'train'), ('val_dataloader', 'test')):
        dataset = dict(type='CustomDataset', data_root=root, data_prefix=split, pipeline=pipeline)
        loaders[name] = dict(
            batch_size=64,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dataset,
        )
    return Config(dict(default_scope=cfg.get('default_scope', 'mmpretrain'), **loaders))


def networks(job: dict[str, Any], cfg: Config) -> dict[str, nn.Module]:
    """The backbones to probe; FP32 is left out if its accuracy is known."""
    found: dict[str, nn.Module] = {}
    for stage, name in (('stage1', STAGE1_NAME), ('stage2', FINAL_NAME)):
        model = MODELS.build(copy.deepcopy(cfg.model))
        model.load_state_dict(read_checkpoint(Path(job['work_dir'], name))['state_dict'])
        found[stage] = model.eval()
    if job['fp32'] is None:
        twin = MODELS.build(copy.deepcopy(model.gplq.float_cfg))
        load_float_(twin, read_checkpoint(job['checkpoint']))
        found['fp32'] = twin.eval()
    return found


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    cfg = row_config(job)
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    data = probe_data(cfg, job['transfer_root'])
    result: dict[str, Any] = {'fp32': job['fp32']}
    with StageMeter() as meter:
        for stage, network in networks(job, cfg).items():
            (result[stage],) = (round(x, 3) for x in probe(network, data, seeds=[job['seed']]))
    result.update(seconds=round(meter.seconds, 1), peak_memory_bytes=meter.peak_memory_bytes)
    write_json(Path(job['result']), {**result, 'metric': 'linear probe'})


if __name__ == '__main__':
    sys.exit(run_tool(main))
