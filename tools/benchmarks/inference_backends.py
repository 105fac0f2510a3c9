# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Backends of the inference benchmark: what runs a model, from which files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from inference_machine import no_bf16, no_compiler, processor_flags

OURS = 'ours'
"""Bits of rows whose bits are those of the recipe."""


class Backend(NamedTuple):
    """One row of the benchmark.

    Attributes:
        bits: ``fp32``, ``bf16``, ``w8a8``, or ``OURS``.
        needs: Files of ``inference_files.MAKERS`` that it runs.
        file: Prefix and suffix of the file that is deployed.
        runs: ``torch``, ``onnxruntime`` or ``openvino``.
        option: For torch, how the model is changed: ``eager``, ``compile``, ``bf16``,
            ``simulated`` or ``integer``.
    """

    bits: str
    needs: tuple[str, ...]
    file: tuple[str, str]
    runs: str
    option: str = ''

    @property
    def is_float(self) -> bool:
        """Whether it is a float baseline."""
        return self.bits in ('fp32', 'bf16')

    def unavailable(self, reasons: dict[str, str]) -> str:
        """Why it cannot run here; empty if it can.

        Args:
            reasons: ``reasons`` of `case.json`.
        """
        if self.option == 'bf16' and (reason := no_bf16(processor_flags())):
            return reason
        if self.option == 'compile' and (reason := no_compiler()):
            return reason
        return next((reasons[name] for name in self.needs if name in reasons), '')


_FLOAT_ONNX = ('float_onnx',)
BACKENDS: dict[str, Backend] = {
    'torch': Backend('fp32', ('float',), ('float', '.pth'), 'torch', 'eager'),
    'torch compile': Backend('fp32', ('float',), ('float', '.pth'), 'torch', 'compile'),
    'torch bf16': Backend('bf16', ('float',), ('float', '.pth'), 'torch', 'bf16'),
    'simulated': Backend(OURS, ('quantized',), ('quantized', '.pth'), 'torch', 'simulated'),
    'integer': Backend(OURS, ('quantized',), ('packed', '.pth'), 'torch', 'integer'),
    'onnxruntime': Backend('fp32', _FLOAT_ONNX, ('float', '.onnx'), 'onnxruntime'),
    'onnxruntime int8 dynamic': Backend(
        'w8a8', (*_FLOAT_ONNX, 'int8_dynamic'), ('int8_dynamic', '.onnx'), 'onnxruntime'
    ),
    'onnxruntime int8 static': Backend(
        'w8a8', (*_FLOAT_ONNX, 'int8_static'), ('int8_static', '.onnx'), 'onnxruntime'
    ),
    'our ONNX': Backend(OURS, ('quantized', 'our_onnx'), ('ours', '.onnx'), 'onnxruntime'),
    'OpenVINO': Backend('fp32', (*_FLOAT_ONNX, 'float_openvino'), ('float', '.xml'), 'openvino'),
    'our OpenVINO': Backend(OURS, ('quantized', 'our_openvino'), ('ours', '.xml'), 'openvino'),
}
"""Row name -> backend, in the order of the table."""


class TorchModel:
    """A torch model that runs on images.

    Args:
        model: Classifier or detector in evaluation mode.
        metas: Meta data of the images.
        autocast: Whether products run in bfloat16.
    """

    def __init__(self, model: Any, metas: Sequence[dict[str, Any]], autocast: bool = False) -> None:
        self.model, self.metas, self.autocast = model, list(metas), autocast

    def caller(self, images: np.ndarray, first: int = 0) -> Callable[[], Any]:
        """A function that runs the model on images ``(B, 3, H, W)`` from number ``first`` on."""
        import torch
        from inference_models import predict

        inputs = torch.from_numpy(images)
        metas = [self.metas[(first + i) % len(self.metas)] for i in range(len(images))]

        def call() -> Any:
            with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=self.autocast):
                return predict(self.model, inputs, metas)

        return call


class SessionModel:
    """An exported classifier in its runtime, without torch."""

    def __init__(self, sessions: dict[int, Callable[[np.ndarray], list[np.ndarray]]]) -> None:
        self.sessions = sessions

    def caller(self, images: np.ndarray, first: int = 0) -> Callable[[], Any]:
        """As in ``TorchModel``; the batch size is one of the exported ones."""
        run = self.sessions[len(images)]
        return lambda: run(images)


def open_onnxruntime(path: Path, threads: int) -> Callable[[np.ndarray], list[np.ndarray]]:
    """A function that runs an ONNX file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def open_openvino(path: Path, threads: int) -> Callable[[np.ndarray], list[np.ndarray]]:
    """A function that runs an OpenVINO model; its float operations stay float32."""
    import openvino

    settings = {
        'INFERENCE_NUM_THREADS': threads,
        'NUM_STREAMS': 1,
        'INFERENCE_PRECISION_HINT': 'f32',
    }
    compiled = openvino.Core().compile_model(path, 'CPU', settings)
    request = compiled.create_infer_request()

    def run(images: np.ndarray) -> list[np.ndarray]:
        found = request.infer({0: images}, share_inputs=True)
        return [found[output] for output in compiled.outputs]

    return run


OPENERS = {'onnxruntime': open_onnxruntime, 'openvino': open_openvino}
