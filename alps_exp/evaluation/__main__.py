"""python -m alps_exp.evaluation: write tasks' rows and YAML files to a folder (`task_data`)."""

from ..base.terminal import settle

settle()  # before the imports that take seconds

import sys  # noqa: E402

from .task_data import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
