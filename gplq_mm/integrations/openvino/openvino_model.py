# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""OpenVinoModel: runs a model in OpenVINO's format on the CPU; precision of what it executes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..onnx.onnx_model import check_size
from ..onnx.packages import Precision, outside_of, precision_of, require

OUTSIDE = 'gplq_mm_outside'
"""Name of the runtime information with the content of ``graph_passes.OUTSIDE``."""
PRODUCTS = ('FullyConnected', 'MatMul', 'Convolution', 'GroupConvolution', 'Deconvolution', 'Gemm')
"""Types of layers of the executed graph that multiply matrices."""
_NAMES = {'f32': 'float32', 'f16': 'float16', 'bf16': 'bfloat16', 'i8': 'int8', 'u8': 'uint8'}


class OpenVinoModel:
    """A model in OpenVINO's format, called with a tensor of images.

    Args:
        path: ``.xml`` file; the ``.bin`` file lies beside it.
        threads: Threads of the CPU plugin; torch's number if None.

    Attributes:
        shape: Shape of the images; a name where any size is accepted.
        outside: What ``export`` says of float products outside the recipe's scope; else empty.

    Raises:
        ModuleNotFoundError: If openvino is missing.
        FileNotFoundError: If one of the two files is missing.
        ValueError: If the file cannot be read.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        require(['openvino'], 'running an OpenVINO file')
        import openvino

        self.path = Path(path)
        for file in (self.path, self.path.with_suffix('.bin')):
            if not file.is_file():
                raise FileNotFoundError(f'no OpenVINO file at {file.absolute()}')
        options = {
            'INFERENCE_NUM_THREADS': threads or torch.get_num_threads(),
            'INFERENCE_PRECISION_HINT': 'f32',
            'PERFORMANCE_HINT': 'LATENCY',
        }
        core = openvino.Core()
        try:
            model = core.read_model(self.path)
            self.compiled = core.compile_model(model, 'CPU', options)
        except RuntimeError as error:
            raise ValueError(f'{path} cannot be loaded by OpenVINO: {error}') from error
        info = model.get_rt_info()
        self.outside = str(info[OUTSIDE].astype(str)) if OUTSIDE in info else ''
        shape = self.compiled.input(0).get_partial_shape()
        self.shape: tuple[Any, ...] = tuple(
            'any' if size.is_dynamic else size.get_length() for size in shape
        )

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the file.

        Args:
            images: Normalized images, ``(B, 3, H, W)``, on any device.

        Raises:
            ValueError: If the file has another size.
        """
        check_size(self.path, self.shape, images.shape)
        results = self.compiled(images.detach().cpu().float().contiguous().numpy())
        outputs = (results[i] for i in range(len(self.compiled.outputs)))
        return tuple(torch.from_numpy(x.copy()).to(images.device) for x in outputs)


def precisions(path: str | Path) -> list[Precision]:
    """Matrix products of the graph that OpenVINO's CPU plugin executes.

    Args:
        path: ``.xml`` file.

    Returns:
        Products in the order of execution.

    Raises:
        ModuleNotFoundError: If openvino is missing.
        FileNotFoundError: If one of the two files is missing.
        ValueError: If the file cannot be read.
    """
    model = OpenVinoModel(path)
    outside = outside_of(model.outside)
    found = []
    for node in model.compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        kind = str(info['layerType'].astype(str)) if 'layerType' in info else ''
        if kind not in PRODUCTS:
            continue
        precision = str(info['runtimePrecision'].astype(str))
        layers = str(info['originalLayersNames'].astype(str)).split(',')
        names = [node.get_friendly_name(), *layers]
        found.append(precision_of(names, kind, _NAMES.get(precision.lower(), precision), outside))
    return found
