# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Convert Swin's own Cascade Mask R-CNN for configs/gplq/cascade_mask_rcnn_swin-t_*.py."""

from pathlib import Path

from gplq_mm.integrations.mm.converters.command import main
from gplq_mm.integrations.mm.converters.swin_checkpoint import convert_swin_state_dict

URL = (
    'https://github.com/SwinTransformer/storage/releases/download/v1.0.2/'
    'cascade_mask_rcnn_swin_tiny_patch4_window7.pth'
)
CONFIG = (
    Path(__file__).resolve().parents[2] / 'configs/gplq/_base_/cascade_mask_rcnn_swin-t_coco.py'
)
OUT = 'checkpoints/cascade_mask_rcnn_swin_tiny_patch4_window7.pth'

if __name__ == '__main__':
    main(__doc__, URL, CONFIG, OUT, convert_swin_state_dict)
