# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""torchvision: Swin and Swin V2, feed-forward networks."""
