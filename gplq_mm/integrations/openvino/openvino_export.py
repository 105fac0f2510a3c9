# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Export of a finished model to OpenVINO's two files, ``.xml`` and ``.bin``."""

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import Tensor, nn

from ..onnx import graph_passes
from ..onnx.onnx_export import ExportedOperation, translate
from ..onnx.packages import require
from .fake_quantize_style import FAKE_QUANTIZE, LEVELS, WEIGHT, FakeQuantizeStyle, StoredWeight
from .openvino_model import OUTSIDE

DOMAIN = 'org.openvinotoolkit'
"""Domain of FakeQuantize that OpenVINO's reader of ONNX knows."""


def export(
    model: nn.Module,
    path: str | Path,
    example: Tensor,
    *,
    dynamic: Mapping[int, str] | None = None,
    output_names: Sequence[str] | None = None,
    owner: nn.Module | None = None,
) -> list[ExportedOperation]:
    """Write a finished model for OpenVINO.

    Args:
        model: See ``integrations.onnx.export``.
        path: Output file, ``.xml``; the weights are written beside it, ``.bin``.
        example: Images, ``(B, 3, H, W)``, B at least 2 where the batch is dynamic.
        dynamic: Axes of the images whose size may differ, with names; the batch if None.
        output_names: Names of the outputs.
        owner: See ``integrations.onnx.export``.

    Returns:
        Every quantized operation of the model and what its file multiplies.

    Raises:
        ModuleNotFoundError: If openvino is missing.
        ValueError: For another suffix, and for a model that stage 2 has not finished.
    """
    require(['openvino'], 'export to OpenVINO')
    import openvino

    path = Path(path)
    if path.suffix != '.xml':
        raise ValueError(f'{path}: OpenVINO files end with .xml; write {path.with_suffix(".xml")}')
    style = FakeQuantizeStyle()
    proto, exported = translate(
        model,
        example,
        style,
        dynamic,
        output_names,
        owner,
        partial(store_integers_, weights=style.weights),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, written = Path(folder) / 'model.onnx', Path(folder) / path.name
        onnx.save(proto, source)
        converted = openvino.convert_model(source)
        outside = next(p.value for p in proto.metadata_props if p.key == graph_passes.OUTSIDE)
        converted.set_rt_info(outside, OUTSIDE)
        openvino.save_model(converted, written, compress_to_fp16=False)
        for file in (written.with_suffix('.bin'), written):
            file.replace(path.with_suffix(file.suffix))
    return exported


def initializer(graph: Any, name: str, array: np.ndarray) -> Any:
    """Add an array to the initializers of an ``onnx_ir.Graph``; returns the value."""
    import onnx_ir as ir

    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.val(name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def store_integers_(model: Any, weights: Mapping[str, StoredWeight]) -> None:
    """Store weights as int8, and turn marked Clips into FakeQuantize, in place.

    OpenVINO keeps constants in int8 only if a product with their scale follows.

    Args:
        model: ``onnx_ir.Model`` in ``FakeQuantizeStyle``.
        weights: Of the style.
    """
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph):
        name = node.metadata_props.get(WEIGHT)
        if name is None:
            continue
        codes = initializer(graph, f'{name}/weight', weights[name].codes)
        factors = initializer(graph, f'{name}/factors', weights[name].factors)
        cast = ir.node('Cast', [codes], {'to': ir.DataType.FLOAT}, name=f'{name}/weight_Cast')
        scaled = ir.node('Mul', [cast.outputs[0], factors], name=f'{name}/weight_Mul')
        graph.insert_before(node, [cast, scaled])
        node.replace_input_with(1, scaled.outputs[0])
    for node in list(graph):
        if FAKE_QUANTIZE not in node.metadata_props:
            continue
        x, low, high = node.inputs
        fake = ir.node(
            'FakeQuantize',
            [x, low, high, low, high],
            {'levels': LEVELS},
            domain=DOMAIN,
            name=node.name.replace('Clip', 'FakeQuantize'),
        )
        fake.metadata_props.update(node.metadata_props)
        graph.insert_before(node, fake)
        node.outputs[0].replace_all_uses_with(fake.outputs[0])
        graph.remove(node, safe=True)
    model.opset_imports[DOMAIN] = 1
