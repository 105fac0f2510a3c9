# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Images of a run: for calibration, for losses, and what a model gives for them."""
