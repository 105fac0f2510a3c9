# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Style ``qdq``."""
