# Linear probe of a quantized, frozen backbone on Oxford Flowers-17. Any backbone:
# python tools/transfer.py configs/gplq/flowers17_transfer.py work_dirs/X/gplq_final.pth
_base_ = ['./_base_/flowers17.py', './_base_/linear_probe.py']
model = dict(type='gplq_mm.LinearProbe', num_classes=_base_.num_classes, drop_path_rate=0.1)
