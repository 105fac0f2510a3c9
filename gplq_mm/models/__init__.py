# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Floor 5: what configs build (``gplq``, ``necks``), and mimicking.

The registries import what they need, so that the ``mimic_*`` files need torch alone.
"""
