# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Files that the backends of the inference benchmark run, written before anything is timed.

    python tools/benchmarks/inference_files.py FOLDER     # called by inference.py

A file that cannot be written leaves its reason in `FOLDER/case.json`; its rows then say so.
"""

import argparse
import json
import logging
import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inference_machine import first_line, not_installed
from inference_models import Case, ExportedPart, config_case, random_case

from gplq_mm.analysis import write_json
from gplq_mm.analysis.report import bits_label
from gplq_mm.api.checkpoint_file import write_checkpoint
from gplq_mm.deployment.packed_file import packed_checkpoint

Maker = Callable[[Case, Path, dict[str, Any]], None]


def open_case(about: dict[str, Any]) -> Case:
    """The case that `inference.py` described in `case.json`."""
    if about.get('config'):
        return config_case(about['config'], about['checkpoint'], about['data'])
    return random_case(about['name'], about['recipe'])


def batch_file(folder: Path, name: str, batch: int, suffix: str) -> Path:
    """File of one exported model; its batch size is fixed."""
    return folder / f'{name}_batch{batch}{suffix}'


def write_images(case: Case, folder: Path, about: dict[str, Any]) -> None:
    """Images that every backend gets, and the size of the model's inputs."""
    images, metas = case.images(about['images'])
    np.save(folder / 'images.npy', images.numpy())
    write_json(folder / 'metas.json', {'metas': metas})
    about.update(size=list(images.shape[-2:]), task=case.task, weights=case.weights)


def write_float(case: Case, folder: Path, about: dict[str, Any]) -> None:
    """State dict of the float model, for its size."""
    torch.save(case.build_float().state_dict(), folder / 'float.pth')


def write_quantized(case: Case, folder: Path, about: dict[str, Any]) -> None:
    """The quantized model, unpacked and packed."""
    model = case.build_quantized(folder)
    recipe = model.gplq.recipe
    about.update(bits=bits_label(recipe.as_dict(), 'stage2').lower(), scope=str(recipe.scope))
    if not (folder / 'quantized.pth').is_file():
        torch.save(model.state_dict(), folder / 'quantized.pth')
    write_checkpoint(packed_checkpoint(model, {}), folder / 'packed.pth')


def write_float_onnx(case: Case, folder: Path, about: dict[str, Any]) -> None:
    """The float model as torch exports it."""
    part = ExportedPart(case.build_float()).eval()
    for batch in about['batches']:
        path = batch_file(folder, 'float', batch, '.onnx')
        example = torch.zeros(batch, 3, *about['size'])
        with torch.no_grad():
            # Swin's masks at a detector's image size keep its folding busy for minutes; the
            # runtimes fold them when they load the file
            program = torch.onnx.export(
                part, (example,), dynamo=True, verbose=False, optimize=not part.is_features
            )
        assert program is not None
        program.save(path, external_data=False)


def write_dynamic_int8(case: Case, folder: Path, about: dict[str, Any]) -> None:
    """Onnxruntime's dynamic quantization of the float file, with its default settings."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for batch in about['batches']:
        source = _required(batch_file(folder, 'float', batch, '.onnx'))
        target = batch_file(folder, 'int8_dynamic', batch, '.onnx')
        # convolutions stay float: its ConvInteger is slower, and has no kernel for all of them
        quantize_dynamic(
            source, target, weight_type=QuantType.QInt8, op_types_to_quantize=['MatMul', 'Gemm']
        )


def write_static_int8(case: Case, folder: Path, about: dict[str, Any]) -> None:
    """Onnxruntime's static quantization, calibrated on images of the benchmark."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self, images: np.ndarray, name: str) -> None:
            self.batches = iter([{name: images}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    images = np.load(folder / 'images.npy')
    for batch in about['batches']:
        source = _required(batch_file(folder, 'float', batch, '.onnx'))
        target = batch_file(folder, 'int8_static', batch, '.onnx')
        reader = Images(np.resize(images, (batch, *images.shape[1:])), input_name(source))
        options = {'weight_type': QuantType.QInt8, 'activation_type': QuantType.QUInt8}
        quantize_static(source, target, reader, per_channel=True, **options)


def write_our_onnx(case: Case, folder: Path, about: dict[str, Any]) -> None:
    """Our ONNX file: `gplq_mm.integrations.onnx`."""
    _export_ours('onnx', '.onnx', case, folder, about)


def write_float_openvino(case: Case, folder: Path, about: dict[str, Any]) -> None:
    """OpenVINO's conversion of the float ONNX file."""
    import openvino

    for batch in about['batches']:
        source = _required(batch_file(folder, 'float', batch, '.onnx'))
        model = openvino.convert_model(source)
        openvino.save_model(model, batch_file(folder, 'float', batch, '.xml'), False)


def write_our_openvino(case: Case, folder: Path, about: dict[str, Any]) -> None:
    """Our OpenVINO file: `gplq_mm.integrations.openvino`."""
    _export_ours('openvino', '.xml', case, folder, about)


def input_name(path: Path) -> str:
    """Name of an ONNX file's first input."""
    import onnx

    return onnx.load(path, load_external_data=False).graph.input[0].name


MAKERS: dict[str, tuple[Maker, tuple[str, ...]]] = {
    'float': (write_float, ()),
    'quantized': (write_quantized, ()),
    'float_onnx': (write_float_onnx, ('onnx', 'onnxscript')),
    'int8_dynamic': (write_dynamic_int8, ('onnx', 'onnxruntime')),
    'int8_static': (write_static_int8, ('onnx', 'onnxruntime')),
    'our_onnx': (write_our_onnx, ('onnx', 'onnxscript')),
    'float_openvino': (write_float_openvino, ('openvino',)),
    'our_openvino': (write_our_openvino, ('openvino',)),
}
"""Files -> the function that writes them, the packages that it needs."""


def write_files(folder: Path) -> dict[str, Any]:
    """Write the files that backends need; returns `case.json` with a reason for each that fails.

    Args:
        folder: Folder with `case.json`: `name`, `recipe`, `batches`, `images`, `files` (names of
            `MAKERS`), and for a user's model `config`, `checkpoint`, `data`.
    """
    about: dict[str, Any] = json.loads((folder / 'case.json').read_text())
    case = open_case(about)
    reasons: dict[str, str] = {}
    write_images(case, folder, about)
    for name, (make, packages) in MAKERS.items():
        if name not in about['files']:
            continue
        print(f'{about["name"]}: {name}', flush=True)
        reasons[name] = not_installed(*packages) or _attempt(make, case, folder, about)
    about['reasons'] = {name: reason for name, reason in reasons.items() if reason}
    write_json(folder / 'case.json', about)
    return about


def _attempt(make: Maker, case: Case, folder: Path, about: dict[str, Any]) -> str:
    """Reason why a file could not be written, empty if it was."""
    try:
        make(case, folder, about)
    except Exception as error:  # other libraries may raise anything; the row says what
        traceback.print_exc()
        return first_line(error)
    return ''


def _export_ours(library: str, suffix: str, case: Case, folder: Path, about: dict) -> None:
    export = import_module(f'gplq_mm.integrations.{library}').export
    model = case.build_quantized(folder)
    part = ExportedPart(model).eval()
    for batch in about['batches']:
        example = torch.zeros(batch, 3, *about['size'])
        export(part, batch_file(folder, 'ours', batch, suffix), example, dynamic={}, owner=model)


def _required(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f'{path.name} was not written: see its own reason')
    return path


def main() -> None:
    """Write all files of a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('folder', type=Path)
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime warns for each bias
    with suppress(KeyError):
        torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    write_files(args.folder)


if __name__ == '__main__':
    main()
