"""Standard output and error as a command line needs them: what becomes of a printed line never fails a run.

Imports next to nothing, so that a command can be interrupted in one line from its first moment on.
"""

from __future__ import annotations

import atexit
import codecs
import errno
import io
import os
import select
import sys

INTERRUPTED = 130

# Signs of tables and texts, for encodings that lack them.
_PLAIN = str.maketrans({"–": "-", "−": "-", "±": "+-", "·": ".", "×": "x", "…": "...", "²": "2", "‖": "||", "’": "'"})


class _Lenient(io.FileIO):
    """A descriptor whose first failure (a full disk, a reader that has gone) is kept, and ends the writing."""

    lost: OSError | None = None

    def write(self, data) -> int:
        while self.lost is None:
            try:
                written = super().write(data)
            except OSError as error:
                self.lost = error
            else:
                if written is not None:
                    return written
                select.select([], [self], [])  # a pipe that is full, and set not to wait
        return len(data)


def settle() -> None:
    """See to it that this process's output never raises, and that an interrupt ends it in one line at any time.

    Closed streams become the null device; signs that an encoding lacks are written in ASCII; what cannot be written is
    dropped, which is said in the end unless the reader has gone. Streams that somebody has put in place of the
    process's own, as test runners do, stay.
    """
    sys.excepthook = _excepthook
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the next file opened would take this number, and get what libraries print
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    codecs.register_error("alps_exp.plain", _plain)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        raw = getattr(getattr(stream, "buffer", None), "raw", None)
        if stream is not getattr(sys, f"__{name}__") or isinstance(raw, _Lenient):
            continue
        lenient = _Lenient(number, "w", closefd=False)
        settled = io.TextIOWrapper(
            io.BufferedWriter(lenient),
            encoding=getattr(stream, "encoding", "utf-8"),
            errors="alps_exp.plain",
            line_buffering=getattr(stream, "line_buffering", False),
            write_through=getattr(stream, "write_through", False),
        )
        setattr(sys, name, settled)
        setattr(sys, f"__{name}__", settled)
        if name == "stdout":
            atexit.register(_tell_loss, settled, lenient)


def interrupted(error: BaseException | None) -> bool:
    """Whether an interrupt is behind an error: code that is cut while it tidies up may raise another in its place."""
    return error is not None and (
        isinstance(error, KeyboardInterrupt) or interrupted(error.__cause__) or interrupted(error.__context__)
    )


def _plain(error: UnicodeError) -> tuple[str, int]:
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def _tell_loss(stream: io.TextIOWrapper, lenient: _Lenient) -> None:
    stream.flush()
    if lenient.lost is not None and lenient.lost.errno != errno.EPIPE:
        print(f"alps_exp: what was printed is lost ({lenient.lost.strerror} on standard output)", file=sys.stderr)


def _excepthook(kind, error, trace) -> None:
    if not interrupted(error):
        return sys.__excepthook__(kind, error, trace)
    print("alps_exp: interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)  # where Python would kill itself by the signal, which is no exit status to some callers
