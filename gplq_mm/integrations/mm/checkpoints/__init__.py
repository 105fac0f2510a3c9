# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Checkpoints of a run: what they record, and models built from them."""
