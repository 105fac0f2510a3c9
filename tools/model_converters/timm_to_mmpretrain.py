# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Convert a timm ViT, DeiT or Swin to mmpretrain, for configs/gplq/vit-s_*.py and others.

Other models: give the file that timm's `torch.save(model.state_dict(), FILE)` wrote, the file to
write, and with --config the target: a float config of mmpretrain or a GPLQ config of this folder.
"""

from pathlib import Path

from gplq_mm.integrations.mm.converters.command import main
from gplq_mm.integrations.mm.converters.timm_checkpoint import convert_timm_state_dict

URL = (
    'https://huggingface.co/timm/vit_small_patch16_224.augreg_in21k_ft_in1k/resolve/main/'
    'pytorch_model.bin'
)
CONFIG = Path(__file__).resolve().parents[2] / 'configs/gplq/_base_/vit-s_imagenet.py'
OUT = 'checkpoints/vit_small_patch16_224.augreg_in21k_ft_in1k.pth'

if __name__ == '__main__':
    main(__doc__, URL, CONFIG, OUT, convert_timm_state_dict)
