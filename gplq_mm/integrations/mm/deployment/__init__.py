# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Deployment of finished MM models: formats of ``tools/deploy.py``, backbones in other runtimes."""
