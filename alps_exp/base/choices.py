"""What keys of a configuration take, where several rooms need to know. Needs no library."""

from __future__ import annotations

PROPAGATE = ("pruned", "dense")
WEIGHTINGS = ("none", "squared")
CAPTURE = ("auto", "block", "groups")
PLACES = ("auto", "device", "host", "disk")
REFITS = ("none", "pcg", "exact", "admm")
