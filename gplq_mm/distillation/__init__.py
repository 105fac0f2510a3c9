# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Stage 1: the student follows the float teacher."""
