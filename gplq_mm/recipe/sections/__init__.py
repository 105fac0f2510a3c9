# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The sections of a recipe: one frozen dataclass each."""
