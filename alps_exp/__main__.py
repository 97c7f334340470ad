"""python -m alps_exp"""

from .streams import settle


def main() -> None:
    """Entry point of `alps-exp` and `python -m alps_exp`; see `cli.main`."""
    settle()
    from .cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
