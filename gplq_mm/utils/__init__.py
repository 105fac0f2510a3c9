# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Tools used on several floors: reading and writing files, editing configs."""
