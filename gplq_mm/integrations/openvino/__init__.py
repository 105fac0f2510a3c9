# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""OpenVINO: export of finished models, and its CPU plugin, imported when they are asked for."""
