# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The gate before stage 1: comparison with the float model, message, added bits."""
