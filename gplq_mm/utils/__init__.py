# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Small tools that no floor owns: reading and writing files, editing configs."""
