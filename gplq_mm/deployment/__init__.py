# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Deployment: the packed file of a finished model."""
