# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Convert mmdet's public ViTDet Mask R-CNN for configs/gplq/mask_rcnn_vit_*.py."""

from pathlib import Path

from gplq_mm.integrations.mm.converters.command import main
from gplq_mm.integrations.mm.converters.vitdet_checkpoint import convert_vitdet_state_dict

URL = (
    'https://download.openmmlab.com/mmdetection/v3.0/vitdet/vitdet_mask-rcnn_vit-b-mae_lsj-100e/'
    'vitdet_mask-rcnn_vit-b-mae_lsj-100e_20230328_153519-e15fe294.pth'
)
CONFIG = Path(__file__).resolve().parents[2] / 'configs/gplq/_base_/mask_rcnn_vit-b_coco.py'
OUT = 'checkpoints/vitdet_mask-rcnn_vit-b-mae_lsj-100e.pth'

if __name__ == '__main__':
    main(__doc__, URL, CONFIG, OUT, convert_vitdet_state_dict)
