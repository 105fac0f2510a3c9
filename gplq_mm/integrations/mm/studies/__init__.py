# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Studies of a checkpoint: sensitivity, mixed bits, weight algorithms, transfer."""
