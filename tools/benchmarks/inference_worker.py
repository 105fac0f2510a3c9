# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The process of one backend in the inference benchmark; it runs only when it is told to.

    python tools/benchmarks/inference_worker.py FOLDER BACKEND THREADS     # called by inference.py

It reads a JSON line per request and answers with one: ``open``, ``time``, ``equal``, ``score``.
"""

import json
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from inference_backends import BACKENDS, OPENERS, SessionModel, TorchModel
from inference_machine import bytes_on_disk, first_line


class Worker:
    """One backend's model.

    Args:
        folder: Folder of the model's files.
        name: One of ``BACKENDS``.
        threads: Threads of the model.
    """

    def __init__(self, folder: Path, name: str, threads: int) -> None:
        self.folder, self.backend, self.threads = folder, BACKENDS[name], threads
        self.about = json.loads((folder / 'case.json').read_text())
        self.images = np.load(folder / 'images.npy')
        self.metas = json.loads((folder / 'metas.json').read_text())['metas']
        self.model: Any = None

    def open(self) -> dict[str, Any]:
        """Load the model; the bytes of its file."""
        backend = self.backend
        if backend.runs == 'torch':
            self.model = self._open_torch()
        elif self.about['task'] == 'detector':
            self.model = self._open_detector()
        else:
            self.model = SessionModel(self._sessions())
        return {'file_bytes': {batch: self._file_bytes(batch) for batch in self.about['batches']}}

    def time(self, batch: int, calls: int) -> dict[str, Any]:
        """Seconds of each of some calls after one that is not counted.

        Args:
            batch: Images a call.
            calls: Calls that are counted.
        """
        number = -(-batch // len(self.images))
        images = np.concatenate([self.images] * number)[:batch]
        call, seconds = self.model.caller(images), []
        for _ in range(calls + 1):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return {'seconds': seconds[1:]}

    def reset_peak(self) -> dict[str, Any]:
        """Start measuring the peak memory."""
        try:
            Path('/proc/self/clear_refs').write_text('5')
        except OSError:
            return {'since': 'start'}  # the peak is then that of the process
        return {'since': 'now'}

    def peak(self) -> dict[str, Any]:
        """Largest resident memory since ``reset_peak``, None where the system does not say."""
        status = Path('/proc/self/status')
        found = re.search(r'VmHWM:\s+(\d+) kB', status.read_text()) if status.is_file() else None
        return {'bytes': int(found.group(1)) * 1024 if found else None}

    def equal(self, batch: int, reference: str, is_reference: bool) -> dict[str, Any]:
        """Compare outputs for all images with those of another backend, bit for bit.

        Args:
            batch: Images a call; a last incomplete batch is left out.
            reference: File of the outputs.
            is_reference: Write the file instead.
        """
        import torch
        from inference_models import as_tensors

        found = [
            [t.clone() for t in as_tensors(self.model.caller(self.images[i : i + batch], i)())]
            for i in range(0, len(self.images) - batch + 1, batch)
        ]
        path = self.folder / reference
        if is_reference:
            torch.save(found, path)
            return {'equal': None, 'images': batch * len(found)}
        expected = torch.load(path, weights_only=True)
        same = len(found) == len(expected) and all(
            len(own) == len(other) and all(map(torch.equal, own, other))
            for own, other in zip(found, expected, strict=True)
        )
        return {'equal': same, 'images': batch * len(found)}

    def score(self) -> dict[str, Any]:
        """Score the user's model on its test set; no metric for random weights."""
        from inference_score import score

        return score(self.about, self.model)

    def _case(self) -> Any:
        import torch

        torch.set_num_threads(self.threads)
        from inference_files import open_case

        return open_case(self.about)

    def _open_torch(self) -> TorchModel:
        import torch

        case, option = self._case(), self.backend.option
        if option in ('simulated', 'integer'):
            model = quantized(case, self.folder, option)
            return TorchModel(model, self.metas)
        model = case.build_float()
        if option == 'compile' and case.task == 'detector':
            model.extract_feat = torch.compile(model.extract_feat)
        elif option == 'compile':
            model = torch.compile(model)
        return TorchModel(model, self.metas, autocast=option == 'bf16')

    def _open_detector(self) -> TorchModel:
        import torch
        from inference_models import with_exported_part

        case, sessions = self._case(), self._sessions()
        float_heads = self.backend.bits != 'ours'
        whole = case.build_float() if float_heads else quantized(case, self.folder, 'integer')

        def features(x: Any) -> Any:
            return tuple(map(torch.from_numpy, sessions[len(x)](x.numpy())))

        return TorchModel(with_exported_part(whole, features), self.metas)

    def _sessions(self) -> dict[int, Any]:
        opener = OPENERS[self.backend.runs]
        return {batch: opener(self._file(batch), self.threads) for batch in self.about['batches']}

    def _file(self, batch: int) -> Path:
        name, suffix = self.backend.file
        of_batch = suffix in ('.onnx', '.xml')
        return self.folder / f'{name}{f"_batch{batch}" if of_batch else ""}{suffix}'

    def _file_bytes(self, batch: int) -> int | None:
        path = self._file(batch)
        return bytes_on_disk(path) if path.is_file() else None


def quantized(case: Any, folder: Path, inference: str) -> Any:
    """The quantized model with an engine."""
    import gplq_mm

    return gplq_mm.deploy(case.build_quantized(folder), inference)


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # libraries print to stdout
    worker = Worker(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop('do'))(**request)
        except Exception as error:  # a runtime may raise anything; the row says what
            traceback.print_exc()
            answer = {'error': first_line(error)}
        answers.write(json.dumps(answer) + '\n')
        answers.flush()


if __name__ == '__main__':
    main()
