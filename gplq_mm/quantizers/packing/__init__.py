# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Integer codes in one byte and back: what training saves in place of float activations."""
