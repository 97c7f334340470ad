"""Python's collector of garbage in a process of the project's own.

What has been imported stays as long as the process, some 700,000 objects. The collector would look through them while
they are made, whenever a run sees to it that memory is free, and when the process ends: a third of what a run of a tiny
model computes. So it waits until they are there, and leaves them alone from then on.
"""

from __future__ import annotations

import gc

_waiting = False


def begin() -> None:
    """Let the collector wait until `settle`, at the start of a command. Not for a process that belongs to others."""
    global _waiting
    _waiting = True
    gc.disable()


def settle() -> None:
    """Leave alone what has been imported, if the collector waits for that."""
    global _waiting
    if _waiting:
        _waiting = False
        gc.freeze()
        gc.enable()
