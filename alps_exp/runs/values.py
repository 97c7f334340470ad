"""What every key at the root of a configuration takes: one list for the checks and for `alps-exp help KEY`.

Needs no torch, whose import takes longer than all else, so that a wrong value is refused at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..base.checks import one_of, require
from ..base.choices import CAPTURE, PLACES, PROPAGATE, REFITS, WEIGHTINGS
from ..base.errors import UserError

SAVE = (False, True, "dense", "packed", "shrunk")
COMPLETE = ("auto", "skip", "renew", "again")
DTYPES = ("float32", "bfloat16", "float16")
_INFINITY = float("inf")


@dataclass(frozen=True)
class Values:
    """What a key takes: some words, a number, or either.

    Attributes:
        words: that are allowed, None among them where the key may be null.
        kind: of the number, int or float; None where none is allowed.
        low, high: between which it lies.
        above: whether `low` itself is not allowed.
        unit: of the number.
        typical: a number for an example.
    """

    words: tuple = ()
    kind: type | None = None
    low: float = 0
    high: float = _INFINITY
    above: bool = False
    unit: str = ""
    typical: float = 1

    def check(self, key: str, value) -> None:
        """Raise UserError unless the value is allowed."""
        if any(type(value) is type(word) and value == word for word in self.words):
            return
        if self.kind is None:
            return one_of(key, value, self.words)
        if self.words and self.words != (None,) and not (isinstance(value, (int, float)) and type(value) is not bool):
            raise UserError(f"{key}={value} is not allowed: give {self}")
        require(key, value, self.kind, self.low, self.high, open_low=self.above)

    def example(self, default: str) -> str:
        """Another value than the default, as it is typed."""
        if self.kind is None:
            said = ["null" if word is None else str(word).lower() for word in self.words]
            return next(word for word in said if word != default)
        return f"{self.typical:g}"

    def __str__(self) -> str:
        said = ["null" if word is None else str(word).lower() for word in self.words]
        if self.kind is not None:
            what = {int: "a whole number", float: "a number"}[self.kind] + (f" of {self.unit}" if self.unit else "")
            end = f" up to {self.high:g}" if self.high != _INFINITY else ""
            said.append(f"{what} {'above' if self.above else 'from'} {self.low:g}{end}")
        return ", or ".join([", ".join(said[:-1]), said[-1]]) if len(said) > 1 else said[0]


_SWITCH = Values((True, False))
ROOT: dict[str, Values] = {
    "nsamples": Values(kind=int, low=1, typical=64),
    "seqlen": Values(kind=int, low=2, typical=2048),
    "batch_size": Values(kind=int, low=1, typical=4),
    "devices": Values(kind=int, low=1, typical=2),
    "seed": Values(kind=int, typical=1),
    "threads": Values(("auto",), int, 1, typical=8),
    "dtype": Values(("auto", *DTYPES)),
    "propagate": Values(PROPAGATE),
    "losses": _SWITCH,
    "refit": Values(REFITS),
    "capture": Values(CAPTURE),
    "expert_shrinkage": Values(kind=float, high=1e6, typical=0.1),
    "expert_weighting": Values(WEIGHTINGS),
    "save": Values(SAVE),
    "stream": Values(("auto", True, False)),
    "hidden_states": Values(PLACES),
    "statistics_cache": Values(("auto",), float, unit="GB", typical=20),
    "resumable": _SWITCH,
    "complete": Values(COMPLETE),
    "minutes": Values((None,), float, above=True, typical=50),
    "plan": _SWITCH,
}


def check_root(cfg: Mapping) -> None:
    """Raise UserError for the first value at the root of a configuration that is not allowed."""
    for key, values in ROOT.items():
        values.check(key, cfg[key])


def check_among(cfg: Mapping) -> None:
    """Raise UserError for values at the root that do not go together, whatever the model is."""
    count, device, nsamples = cfg["devices"], str(cfg["device"]), cfg["nsamples"]
    if count > 1 and not cfg["resumable"]:
        raise UserError(f"devices={count} needs resumable=true: the processes hand their blocks over on the disk")
    if count > 1 and device.startswith("cuda:"):
        raise UserError(f"devices={count} goes with device=auto, cuda or cpu, and device={device} names one device")
    if nsamples < count:
        raise UserError(f"devices={count} is more than the windows to divide (nsamples={nsamples}): give fewer")
    if (limit := cfg["statistics_cache"]) != "auto" and limit and count > 1:
        raise UserError(f"statistics_cache={limit} goes with one process: give devices=1, or statistics_cache=0")
    if (repo := cfg.get("push")) is not None and not cfg["save"]:
        raise UserError(f"save.push={repo} pushes what is saved: give save=true, save=packed or save=shrunk")
