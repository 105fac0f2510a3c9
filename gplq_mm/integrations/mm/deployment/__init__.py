# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Deployment of a finished checkpoint: the formats of ``tools/deploy.py``."""
