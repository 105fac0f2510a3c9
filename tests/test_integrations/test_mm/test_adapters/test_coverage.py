# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""How many operations of each kind are quantized, against the stored table.

After an intended change write the table anew, and look at the difference:
`PYTHONPATH=. python tests/test_integrations/test_mm/test_adapters/test_coverage.py`
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

from gplq_mm.convert import convert_
from tests.helpers.all_backbones import BACKBONES, backbone
from tests.helpers.mm_models import CLASSIFIERS, DETECTORS, classifier, vit_sam
from tests.helpers.segmentors import SEGMENTORS

TABLE = Path(__file__).with_name('coverage.json')
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    **{name: (lambda name=name: classifier(name), 'all') for name in CLASSIFIERS},
    'vit_sam': (vit_sam, 'all'),
    **{name: (lambda name=name: backbone(name), 'all') for name in BACKBONES},
    **{
        f'{name} {scope}': (DETECTORS[name], scope)
        for name in DETECTORS
        for scope in ('backbone', 'backbone+neck', 'all')
    },
    **{
        f'{name} {scope}': (make, scope)
        for name, make in SEGMENTORS.items()
        for scope in ('backbone', 'all')
    },
}


def measure(name: str) -> dict[str, Any]:
    """Counts by kind, what stays float, and how many layers and products have no quantizer."""
    make, scope = MODELS[name]
    report = convert_(make(), dict(base='w4a4', scope=scope))
    return {**report.counts, 'kept_float': len(report.kept_float)}


@pytest.mark.parametrize('name', MODELS)
def test_coverage_is_as_stored(name: str) -> None:
    stored = json.loads(TABLE.read_text(encoding='utf-8'))
    assert measure(name) == stored[name], f'intended? then run: {__doc__}'


def test_table_has_no_other_model() -> None:
    assert set(json.loads(TABLE.read_text(encoding='utf-8'))) == set(MODELS)


if __name__ == '__main__':
    lines = [f'  {json.dumps(name)}: {json.dumps(measure(name))}' for name in MODELS]
    TABLE.write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8')
