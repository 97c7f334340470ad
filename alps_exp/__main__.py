"""python -m alps_exp"""

import sys

from .base import garbage, threads
from .base.terminal import settle


def main() -> None:
    """Entry point of `alps-exp` and `python -m alps_exp`: the words below are commands of their own, and all else is
    `cli.command`."""
    settle()
    threads.begin()
    word, words = next(iter(sys.argv[1:]), ""), sys.argv[1:]
    if word == "report":
        from .report.make import main as report

        sys.exit(report(words[1:]))
    if word in ("list", "show", "diff"):
        from .tables.looking import main as look

        sys.exit(look(words))
    if word == "quick" and not {"--help", "-h"} & set(words):
        garbage.begin()
        from .cli.quick import main as quick

        sys.exit(quick(words[1:]))
    if word in ("help", "--help", "-h") or (word and {"--help", "-h"} & set(words)):
        from .cli.helping import main as help

        sys.exit(help([word for word in words if word not in ("help", "--help", "-h")]))
    garbage.begin()
    from .cli.command import main as command_line

    command_line()


if __name__ == "__main__":
    main()
