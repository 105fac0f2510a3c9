# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Floor 5: models that configs build (``gplq``, ``necks``), and mimicking.

The registries import each file when it is needed, so the ``mimic_*`` files need torch only.
"""
