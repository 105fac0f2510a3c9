# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Export of a finished model to one ONNX file."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ...deployment.finished_check import check_finished
from ...ops import Operation, not_quantized, operations
from ...ops.backends.exact import accumulator_bound
from ...stream.stored_file import unfinished_file
from . import integer_style, qdq_style
from .graph_passes import finish
from .nodes import OPSET, Nodes
from .torch_ops import captured_operations
from .window_ops import TRANSLATIONS

STYLES: dict[str, Any] = {'integer': integer_style, 'qdq': qdq_style}
"""Style -> module that writes its nodes."""


class ExportedOperation(NamedTuple):
    """How one operation is computed in a file.

    Attributes:
        operation: Its name in the model.
        precision: ``uint8 x int8``, ``float32 products of codes``, ``float32``.
        reason: Why no integers are multiplied; empty if they are.
    """

    operation: str
    precision: str
    reason: str


def export(
    model: nn.Module,
    path: str | Path,
    example: Tensor,
    *,
    style: str = 'integer',
    dynamic: Mapping[int, str] | None = None,
    output_names: Sequence[str] | None = None,
    owner: nn.Module | None = None,
) -> list[ExportedOperation]:
    """Write a finished model as one ONNX file.

    Args:
        model: Model after stage 2, called with one tensor of images; a tensor or a tuple of
            tensors is its output.
        path: Output file, ``.onnx``.
        example: Images, ``(B, 3, H, W)``, B at least 2 where the batch is dynamic.
        style: ``integer``: MatMulInteger and ConvInteger, for onnxruntime; ``qdq``: QuantizeLinear
            and DequantizeLinear with symmetric int8 codes, see ``qdq_style``.
        dynamic: Axes of the images whose size may differ from the example's, with names; the
            batch if None.
        output_names: Names of the outputs.
        owner: Model whose names of operations the file has, if ``model`` is a module around it.

    Returns:
        Every quantized operation of the model and what its file multiplies.

    Raises:
        ModuleNotFoundError: If onnx or onnxscript is missing.
        ValueError: For another style, and for a model that stage 2 has not finished.
    """
    if style not in STYLES:
        raise ValueError(f'style={style!r}: write one of {tuple(STYLES)}')
    proto, exported = translate(model, example, STYLES[style], dynamic, output_names, owner)
    with unfinished_file(Path(path)) as unfinished:
        onnx.save(proto, unfinished, format='protobuf')
    return exported


def translate(
    model: nn.Module,
    example: Tensor,
    style: Any,
    dynamic: Mapping[int, str] | None = None,
    output_names: Sequence[str] | None = None,
    owner: nn.Module | None = None,
    edit: Callable[[Any], None] | None = None,
) -> tuple[onnx.ModelProto, list[ExportedOperation]]:
    """The model in ONNX, checked, not written; arguments as for ``export``.

    Args:
        model: See ``export``.
        example: See ``export``.
        style: Module or object with ``refusal``, ``precision``, ``layer`` and ``product``, and
            with ``shared_product`` unless it refuses products with a shared left operand.
        dynamic: See ``export``.
        output_names: See ``export``.
        owner: See ``export``.
        edit: Called with the ``onnx_ir.Model``, which it changes before operations are named.
    """
    check_finished(model)
    known = operations(owner or model)
    active = {n: o for n, o in known.items() if not not_quantized(o.quantizers)}
    refused = {name: style.refusal(operation) for name, operation in active.items()}

    def refusal(name: str, depth: int) -> str:
        left, right = active[name].quantizers
        if accumulator_bound(left, right, depth) > style.SUM_LIMIT:
            refused[name] = f'sums of {depth} products may exceed {style.SUM_LIMIT}'
        return refused[name]

    def of_layer(x: Any, bias: Any, name: str) -> Any:
        return style.layer(Nodes(name), known[name], x, bias)

    def of_product(lhs: Any, rhs: Any, name: str) -> Any:
        return style.product(Nodes(name), known[name], lhs, rhs)

    def of_shared(codes: Any, rhs: Any, scale: Any, name: str) -> Any:
        return style.shared_product(Nodes(name), known[name], codes, rhs, scale)

    was_training = model.training
    model.eval()
    try:
        with _without_chatter(), captured_operations(known, refusal):
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=['images'],
                output_names=output_names,
                dynamic_shapes=({0: 'batch'} if dynamic is None else dict(dynamic),),
                custom_translation_table={
                    torch.ops.gplq_mm.layer.default: of_layer,
                    torch.ops.gplq_mm.product.default: of_product,
                    torch.ops.gplq_mm.shared_product.default: of_shared,
                    **TRANSLATIONS,
                },
            )
    finally:
        model.train(was_training)
    assert program is not None
    if edit is not None:
        edit(program.model)
    finish(program.model, model, owner or model)
    proto = ir.to_proto(program.model)
    onnx.checker.check_model(proto)  # skips nodes of other domains than ONNX's
    return proto, [_described(name, known[name], style, refused) for name in known]


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Hide what the exporter's libraries report of themselves at every export."""
    logger = logging.getLogger('onnxscript')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', '.*LeafSpec.*', FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _described(
    name: str, operation: Operation, style: Any, refused: Mapping[str, str]
) -> ExportedOperation:
    reason = not_quantized(operation.quantizers)
    if reason:
        return ExportedOperation(name, 'float32', reason)
    if refused[name]:
        return ExportedOperation(name, 'float products of codes', refused[name])
    return ExportedOperation(name, style.precision(operation), '')
