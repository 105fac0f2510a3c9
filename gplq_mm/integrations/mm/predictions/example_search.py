# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The validation images on which FP32 and quantized model differ most, with pictures."""

import heapq
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ....analysis import write_json
from ....pages.run_files import examples_path
from .differences import box_difference, box_states, label_difference
from .plain_prediction import plain_prediction
from .prediction_log import class_name, classes_of, read_log
from .thumbnail import thumbnail

MOST_EXAMPLES = 12


class ExampleSearch:
    """Compares a validation of the quantized model with the log of the FP32 model.

    Args:
        report: Path of the JSON report; the log lies in its folder.
        loop: Val loop; its data set names the classes.
        preprocessor: The model's data preprocessor.
    """

    def __init__(self, report: Path, loop: Any, preprocessor: Any) -> None:
        self.report = report
        self.float_images = read_log(report.parent)
        self.classes = classes_of(loop)
        self.preprocessor = preprocessor
        self.seen = self.compared = self.different = 0
        self.worst: list[tuple[float, int, dict[str, Any]]] = []

    def watch(self, batch: Any, samples: Sequence[Any]) -> None:
        """Compare a batch; keep its pictures if they are among the worst."""
        inputs = batch['inputs']
        for index, sample in enumerate(samples):
            if self.seen >= len(self.float_images):
                return
            before = self.float_images[self.seen]
            self.seen += 1
            now = plain_prediction(sample)
            if before is None or now is None or before['name'] != now['name']:
                continue
            self.compared += 1
            self._compare(before, now, inputs[index], sample)

    def _compare(
        self, before: dict[str, Any], now: dict[str, Any], image: Any, sample: Any
    ) -> None:
        is_detector = 'boxes' in now
        if is_detector:
            difference = box_difference(before['boxes'], now['boxes'])
        else:
            difference = label_difference(before, now)
        self.different += difference > 0
        full = len(self.worst) >= MOST_EXAMPLES
        if difference <= 0 or (full and difference <= self.worst[0][0]):
            return
        jpeg, width, height = thumbnail(image, sample, self.preprocessor)
        both = self._boxes(before, now) if is_detector else self._labels(before, now)
        entry = {'name': now['name'], 'jpeg': jpeg, 'width': width, 'height': height, **both}
        item = difference, -self.seen, {**entry, 'difference': difference}
        (heapq.heappushpop if full else heapq.heappush)(self.worst, item)

    def _labels(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
        truth = now['truth']
        sides = {'fp32': before, 'quantized': now}
        return {
            'truth': None if truth is None else class_name(self.classes, truth),
            **{
                side: {
                    'class': class_name(self.classes, found['label']),
                    'score': found['score'],
                    'right': None if truth is None else found['label'] == truth,
                }
                for side, found in sides.items()
            },
        }

    def _boxes(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
        states = box_states(before['boxes'], now['boxes'])
        sides = zip(('fp32', 'quantized'), (before, now), states, strict=True)
        return {
            side: [
                {
                    'box': box[:4],
                    'score': box[4],
                    'class': class_name(self.classes, int(box[5])),
                    'state': state,
                }
                for box, state in zip(found['boxes'], states_of_side, strict=True)
            ]
            for side, found, states_of_side in sides
        }

    def write(self) -> None:
        """Write the examples beside the report; without a compared image there is no such file."""
        if not self.compared:
            examples_path(self.report).unlink(missing_ok=True)
            return
        worst = [entry for _, _, entry in sorted(self.worst, key=lambda item: -item[0])]
        counts = {'compared': self.compared, 'different': self.different}
        write_json(examples_path(self.report), {**counts, 'examples': worst})
