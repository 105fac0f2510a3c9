# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Floor 3: procedures on converted models, in plain torch."""
