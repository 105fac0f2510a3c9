# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""`python -m gplq_mm.doctor`, short form of `python -m gplq_mm doctor`."""

import sys

from gplq_mm.__main__ import main

if __name__ == '__main__':
    sys.exit(main(['doctor', *sys.argv[1:]]))
