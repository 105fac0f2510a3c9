# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Calibration: scales of activations, and float weights fitted to quantized inputs."""
