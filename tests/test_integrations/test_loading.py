# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import subprocess
import sys

from gplq_mm.compat.installed import is_installed
from gplq_mm.integrations.loading import ADAPTERS, load_adapters

WITHOUT_LIBRARIES = """
import sys
for blocked in ('mmdet', 'mmpretrain'):
    sys.modules[blocked] = None
from gplq_mm.integrations.loading import load_adapters
print(*load_adapters())
"""


def test_loads_what_is_installed() -> None:
    loaded = load_adapters()
    libraries = [name for name in ('mmcv', 'mmpretrain', 'mmdet') if is_installed(name)]
    assert [name for name in loaded if name in libraries] == libraries
    assert set(loaded) <= set(ADAPTERS)
    assert load_adapters() == loaded


def test_a_missing_library_takes_no_other_down() -> None:
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', WITHOUT_LIBRARIES], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert not {'mmdet', 'mmpretrain', 'mmdet_vitdet'} & set(names)
    assert ('mmcv' in names) == is_installed('mmcv')
