# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""OnnxModel: runs an ONNX file with onnxruntime on the CPU, called like a torch module."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .packages import require


class OnnxModel:
    """A model in an ONNX file, called with a tensor of images.

    Args:
        path: ``.onnx`` file with one input.
        threads: Threads of onnxruntime; torch's number if None.
        optimized: Writes the graph to this file, fused and with folded constants as it is executed;
            without the last step, which reorders the memory of convolutions and their names.

    Attributes:
        shape: Shape of the images; a name where any size is accepted: ``('batch', 3, 224, 224)``.

    Raises:
        ModuleNotFoundError: If onnxruntime is missing.
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no ONNX model.
    """

    def __init__(
        self, path: str | Path, threads: int | None = None, optimized: str | Path | None = None
    ) -> None:
        require(['onnxruntime'], 'running an ONNX file')
        if not Path(path).is_file():
            raise FileNotFoundError(f'no ONNX file at {Path(path).absolute()}')
        self.path = Path(path)
        self.session = _session(self.path.read_bytes(), str(path), threads, optimized)
        self._input = self.session.get_inputs()[0]
        self.shape = tuple(self._input.shape)

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the file.

        Args:
            images: Normalized images, ``(B, 3, H, W)``, on any device.

        Raises:
            ValueError: If the file has another size.
        """
        check_size(self.path, self.shape, images.shape)
        array = images.detach().to('cpu', torch.float32).contiguous().numpy()
        outputs = self.session.run(None, {self._input.name: array})
        return tuple(torch.from_numpy(np.asarray(x)).to(images.device) for x in outputs)


def run_with_outputs(proto: Any, names: Sequence[str], images: Tensor) -> dict[str, np.ndarray]:
    """Values inside a model.

    Args:
        proto: ``onnx.ModelProto``; it is not changed.
        names: Values to return.
        images: Its input, ``(B, 3, H, W)``.
    """
    import onnx

    require(['onnxruntime'], 'running an ONNX file')
    extended = onnx.ModelProto()
    extended.CopyFrom(proto)
    present = {output.name for output in extended.graph.output}
    for name in dict.fromkeys(names):
        if name not in present:
            extended.graph.output.append(onnx.ValueInfoProto(name=name))
    session = _session(extended.SerializeToString(), 'the model', None, None)
    array = images.detach().cpu().float().contiguous().numpy()
    values = session.run(list(names), {session.get_inputs()[0].name: array})
    return dict(zip(names, values, strict=True))


def check_size(path: Path, accepted: Sequence[Any], given: Sequence[int]) -> None:
    """Refuse images of another size than a file accepts.

    Args:
        path: The file, for the message.
        accepted: A number, or anything else where every size is accepted.
        given: Shape of the images.

    Raises:
        ValueError: Names both sizes.
    """
    pairs = zip(accepted, given, strict=False)
    if len(accepted) == len(given) and all(a == b for a, b in pairs if isinstance(a, int)):
        return
    size = ' x '.join(str(a) if isinstance(a, int) else 'any' for a in accepted)
    raise ValueError(
        f'{path} was exported for images {size}, got {" x ".join(map(str, given))}; resize or pad '
        'the images to this size, or export again with the size that you need (--sizes H W)'
    )


def _session(model: bytes, name: str, threads: int | None, optimized: str | Path | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        fused = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.graph_optimization_level = fused
    try:
        return onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])
    except Exception as error:  # onnxruntime has no common base class of its errors
        raise ValueError(f'{name} cannot be loaded by onnxruntime: {error}') from error
