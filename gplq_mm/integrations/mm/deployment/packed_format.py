# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The formats ``pth`` and ``safetensors`` of ``tools/deploy.py``: a packed checkpoint, verified."""

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from torch import Tensor, nn

from ....api.checkpoint_file import SAFETENSORS
from ....convert import quantizers
from ....convert.model_facts import facts_of
from ....deployment.packed_file import ABOUT, packed_checkpoint
from ....deployment.packed_weights import finished_layers
from ..checkpoints.checkpoint_io import read_checkpoint, write_checkpoint
from ..checkpoints.run_checkpoint import KEY
from .finished_model import build_finished

INFERENCER = (
    "mmdet's DetInferencer reads .safetensors after import gplq_mm.integrations.mm.builder, or "
    "with custom_imports = dict(imports=['gplq_mm.integrations.mm.builder']) in the config; a "
    '.pth file needs neither'
)


def write_packed(model: nn.Module, cfg: Config, args: Namespace, out: Path) -> list[Path]:
    """Write a packed checkpoint, load it into a second model, and compare the two.

    Args:
        model: Of ``build_finished``.
        cfg: Its config.
        args: ``checkpoint``, whose recipe and meta are stored too, and ``fp16``.
        out: ``.pth`` or ``.safetensors`` file.

    Raises:
        RuntimeError: If the written file does not give the model: an error of this package.
        ValueError: If the checkpoint's meta has more than plain values.
    """
    about = {k: v for k, v in read_checkpoint(args.checkpoint).items() if k in ('meta', KEY)}
    checkpoint = packed_checkpoint(model, about, args.fp16)
    unverified = out.with_name(f'.{out.stem}.{os.getpid()}{out.suffix}')
    try:
        write_checkpoint(checkpoint, unverified)
        again = build_finished(cfg, read_checkpoint(unverified))
        different = sorted(differences(model, again, args.fp16))
        if different:
            raise RuntimeError(
                f'{out} was not written: {len(different)} tensors of the packed model differ, '
                f'first {different[0]}; please report this'
            )
        unverified.replace(out)
    finally:
        unverified.unlink(missing_ok=True)
    _log(checkpoint[KEY][ABOUT])
    if out.suffix == SAFETENSORS and facts_of(model).is_detector:
        print_log(INFERENCER)
    return [out]


@torch.no_grad()
def differences(model: nn.Module, again: nn.Module, fp16: bool) -> Iterator[str]:
    """Names of tensors and weight codes in which two finished models differ.

    Args:
        model: The model that was packed.
        again: The model of the packed file.
        fp16: Whether float tensors outside the quantizers may be rounded to float16.
    """
    own, other = model.state_dict(), again.state_dict()
    yield from own.keys() ^ other.keys()
    kept = tuple(f'{name}.' for name in quantizers(model))
    packed = {layer.weight.data_ptr() for layer in finished_layers(model).values()}
    for key in own.keys() & other.keys():
        rounds = fp16 and not key.startswith(kept) and own[key].data_ptr() not in packed
        if not (_equal(own[key], other[key]) or (rounds and _equal(own[key].half(), other[key]))):
            yield key
    second: Mapping[str, Any] = finished_layers(again)
    for name, layer in finished_layers(model).items():
        if not torch.equal(_codes(layer), _codes(second[name])):
            yield f'codes of {name}'


def _equal(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one.to(two.dtype), two)


def _codes(layer: Any) -> Tensor:
    return layer.codes()['weight'].codes


def _log(about: Mapping[str, Any]) -> None:
    """Say what is not exact, or not small."""
    if not about['equals_unpacked']:
        print_log(
            '--fp16: weight codes and scales are exact, the other float tensors are rounded to '
            'float16: outputs differ slightly from those of the checkpoint; score the file'
        )
    if about['kept_float32']:
        names = about['kept_float32']
        print_log(f'--fp16: {len(names)} tensors are too large for float16, first {names[0]}')
    if about['float_weights']:
        names = about['float_weights']
        print_log(
            f'{len(names)} weights are not on their grid and are stored as float32, first '
            f'{names[0]}'
        )
