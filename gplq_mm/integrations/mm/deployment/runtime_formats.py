# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Rows ``onnx`` and ``openvino`` of the formats: export, then comparison with the simulation."""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from torch import Tensor, nn

from ....convert.model_facts import facts_of
from ..launch.errors import ConfigError
from .any_size import any_size, unlike_at_one_size
from .deployed_backbone import load_model
from .example_pass import image_size
from .exportable import exportable, integer_batch

DYNAMIC_EXAMPLE = (256, 320)
"""Size of the images with which a dynamic size is captured."""
ANOTHER_SIZE = (224, 352)
"""Size with which a file for any size is compared too: more windows in one row, fewer rows."""
ONE_SIZE = (
    'this backbone cannot be exported for any size of images: it computes something in Python from '
    'the size; write --sizes H W, for example --sizes 800 1344, and pad the images to it: '
    "dict(type='gplq_mm.DeployedBackbone', file=..., pad=True)"
)
LARGEST_ERROR = 0.5
"""Largest mean error of an output, as a fraction of its mean magnitude, that a verified file has.
A code that flips changes those after it, by 0.14 on noise in DINOv2 at four bits in OpenVINO; a
wrong scale or layout gives errors around 1."""

Export = Callable[..., Sequence[Any]]


def write_onnx(model: nn.Module, cfg: Config, args: Namespace, out: Path) -> list[Path]:
    """Write and verify an ONNX file; arguments as for ``Format.write``."""
    from ...onnx.onnx_export import export

    style = args.onnx_style or 'integer'
    write(model, args.sizes, out, lambda *a, **k: export(*a, style=style, **k))
    return [out]


def write_openvino(model: nn.Module, cfg: Config, args: Namespace, out: Path) -> list[Path]:
    """Write and verify an OpenVINO model; arguments as for ``Format.write``."""
    from ...openvino.openvino_export import export

    write(model, args.sizes, out, export)
    return [out, out.with_suffix('.bin')]


def write(model: Any, sizes: Sequence[int] | None, out: Path, export: Export) -> None:
    """Export the part of a model that has a runtime format, and compare it on random images.

    Args:
        model: Finished model.
        sizes: Height and width of the images; None for a detector's dynamic size, or for a
            classifier's own size.
        out: Output file.
        export: ``export`` of a runtime.

    Raises:
        ConfigError: If a dynamic size cannot be exported, or the size does not fit the model.
        RuntimeError: If the file gives other outputs than the model.
    """
    part = exportable(model)
    dynamic: Mapping[int, str] | None = None
    size = tuple(sizes) if sizes else image_size(model)
    if sizes is None and facts_of(model).is_detector:
        size, dynamic = DYNAMIC_EXAMPLE, {0: 'batch', 2: 'height', 3: 'width'}
        unlike = unlike_at_one_size(part)
        if unlike:
            raise ConfigError(f'{unlike[0]} has pad_small_map=False: {ONE_SIZE}')
    tried = [(3, size)]  # another number of images than the example's
    if dynamic:
        tried.append((1, ANOTHER_SIZE))
    images = [random_images(*shape) for shape in tried]
    with torch.no_grad():
        try:
            expected = [part(x) for x in images]
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ConfigError(f'the model does not take images of {size}: {error}') from error
    form = any_size if dynamic else integer_batch
    try:
        with form(model):
            exported = export(part, out, images[0][:2], dynamic=dynamic, owner=model)
    except torch.onnx.OnnxExporterError as error:
        if dynamic is None:
            raise
        raise ConfigError(ONE_SIZE) from error
    report(exported)
    verify(out, images[0], expected[0])
    if dynamic:
        try:
            verify(out, images[1], expected[1])
        except RuntimeError as error:  # a size was captured as a number
            raise ConfigError(ONE_SIZE) from error


def random_images(number: int, size: Sequence[int]) -> Tensor:
    """Normalized images, ``(number, 3, H, W)``, the same in every call."""
    return torch.randn(number, 3, *size, generator=torch.Generator().manual_seed(0))


def report(exported: Sequence[Any]) -> None:
    """Log how many operations multiply integers, and each that does not with its reason."""
    floats = [e for e in exported if e.reason]
    print_log(f'{len(exported) - len(floats)} of {len(exported)} operations multiply integers')
    for operation in floats:
        print_log(f'{operation.operation}: {operation.precision}, since {operation.reason}')


def verify(out: Path, images: Tensor, expected: Any) -> None:
    """Compare the outputs of a file with the simulation's.

    Args:
        out: The file.
        images: ``(B, 3, H, W)``.
        expected: Output of the simulation, a tensor or a tuple.

    Raises:
        RuntimeError: If the file does not run on these images, or an output differs by more than
            ``LARGEST_ERROR``.
    """
    run = load_model(out)
    try:
        outputs = run(images)
    except Exception as failure:  # runtimes have errors of their own
        out.unlink()
        raise RuntimeError(
            f'{out} does not run on images {tuple(images.shape)}; the file was removed: {failure}'
        ) from failure
    tensors = (expected,) if isinstance(expected, Tensor) else tuple(expected)
    for index, (found, output) in enumerate(zip(outputs, tensors, strict=True)):
        error = float((found - output).abs().mean() / output.abs().mean().clamp_min(1e-12))
        print_log(f'output {index}: mean error {error:.1e} of the mean magnitude')
        if not error <= LARGEST_ERROR:
            out.unlink()
            raise RuntimeError(
                f'{out}: output {index} differs from the simulation by {error:.2g} of its mean '
                'magnitude; the file was removed'
            )
