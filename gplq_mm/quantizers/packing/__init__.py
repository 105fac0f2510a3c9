# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Packed integer codes, which training saves instead of float activations."""
