# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Stage 1: training of the quantized student with a float teacher."""
