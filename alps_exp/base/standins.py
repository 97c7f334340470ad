"""Questions to classes of this project that need none of what torch computes, answered without its import.

What a method's hyperparameter may be is said by the method's class, whose module imports torch, and others import
transformers: that takes seconds, and asking takes none. So the question is asked in a copy of this process in which
empty modules stand in for those packages, as documentation generators do it. An answer that made use of one is none.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGES = ("torch", "transformers", "tokenizers", "triton", "safetensors", "huggingface_hub", "numpy", "bitsandbytes")


def answered(question: Callable[[], str]) -> str | None:
    """What `question` returns in a copy of this process without the `PACKAGES`.

    Returns:
        The answer; None where it cannot be had so: the packages are here already, the system cannot copy processes, or
        the question raised, or used what stands in for a package, other than by `imported`.
    """
    if not hasattr(os, "fork") or any(name in sys.modules for name in PACKAGES):
        return None
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            sys.meta_path.insert(0, _Finder())
            answer = question()
            if not _touched:
                with open(writer, "w", encoding="utf-8") as pipe:
                    pipe.write(answer)
                status = 0
        finally:
            os._exit(status)  # not a word of the copy, nor what this process does at its end
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        answer = pipe.read()
    return answer if os.waitpid(child, 0)[1] == 0 else None


def imported(name: str) -> ModuleType:
    """A module; whatever it does with stand-ins while it is imported leaves an answer what it is."""
    before = len(_touched)
    module = import_module(name)
    del _touched[before:]
    return module


_touched: list[str] = []


def _part(owner, name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    _touched.append(name)
    return _Thing


class _Kind(type):
    """Whose classes stand in for classes, functions and constants alike."""

    __getattr__ = _part

    def __call__(cls, *values, **named):
        _touched.append("a call")
        # A decorator gives back what it decorates.
        return values[0] if len(values) == 1 and callable(values[0]) and not named else super().__call__()

    def __instancecheck__(cls, value) -> bool:
        _touched.append("isinstance")
        return False

    def __or__(cls, other):
        return cls

    __ror__ = __getitem__ = __or__


class _Thing(metaclass=_Kind):
    def __call__(self, *values, **named):
        return values[0] if values else self

    def __setitem__(self, key, value) -> None:
        _touched.append("an entry")

    def _operation(self, other):
        _touched.append("an operation")
        return self

    __and__ = __or__ = __lshift__ = __rshift__ = __getitem__ = _operation  # tables of bits


class _Module(ModuleType):
    __getattr__ = _part


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in PACKAGES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        _touched.append(spec.name)
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
