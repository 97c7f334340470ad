"""python -m alps_exp"""

import sys

from .base.terminal import settle


def main() -> None:
    """Entry point of `alps-exp` and `python -m alps_exp`: list, show and diff look at runs, all else is `cli.main`."""
    settle()
    if sys.argv[1:2] and sys.argv[1] in ("list", "show", "diff"):
        from .tables.looking import main as look

        sys.exit(look(sys.argv[1:]))
    from .cli.command import main as command_line

    command_line()


if __name__ == "__main__":
    main()
