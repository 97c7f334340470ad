"""python -m alps_exp"""

import sys

from .base.terminal import settle


def main() -> None:
    """Entry point of `alps-exp` and `python -m alps_exp`: list, show and diff look at runs, report makes one page of
    them, all else is `cli.main`."""
    settle()
    if sys.argv[1:2] == ["report"]:
        from .report.make import main as report

        sys.exit(report(sys.argv[2:]))
    if sys.argv[1:2] and sys.argv[1] in ("list", "show", "diff"):
        from .tables.looking import main as look

        sys.exit(look(sys.argv[1:]))
    from .cli.command import main as command_line

    command_line()


if __name__ == "__main__":
    main()
