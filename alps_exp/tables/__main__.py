"""python -m alps_exp.tables"""

from ..base.terminal import settle

settle()  # before the imports that take seconds

import sys

from .make import main

if __name__ == "__main__":
    sys.exit(main())
