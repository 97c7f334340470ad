"""python -m alps_exp.report"""

from ..base.terminal import settle

settle()  # before the imports that take seconds

import sys  # noqa: E402

from .make import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
