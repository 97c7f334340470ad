"""python -m alps_exp"""

from .base.terminal import settle


def main() -> None:
    """Entry point of `alps-exp` and `python -m alps_exp`; see `cli.main`."""
    settle()
    from .cli.command import main as command_line

    command_line()


if __name__ == "__main__":
    main()
