"""python -m alps_exp.tables"""

import sys

from .make import main

if __name__ == "__main__":
    sys.exit(main())
