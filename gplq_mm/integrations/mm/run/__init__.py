# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The steps of a run, as the session calls them."""
