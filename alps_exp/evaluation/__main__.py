"""python -m alps_exp.evaluation: write tasks' rows and YAML files to a folder (`task_data`)."""

from ..base.terminal import settle

settle()  # before the imports that take seconds

import sys

from .task_data import main

if __name__ == "__main__":
    sys.exit(main())
