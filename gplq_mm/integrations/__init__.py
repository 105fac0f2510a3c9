# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Other libraries: nothing outside this folder knows their classes."""
