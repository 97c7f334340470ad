"""How tables order methods and plots draw them: the `_look_` of each yaml in conf/method.

order     place in tables and legends, from the simplest method to the best
colour    of Okabe and Ito's, which the colour-blind can tell apart; a method has the same one everywhere
marker    matplotlib's; printed in grey, markers and line styles tell methods apart
line      solid, or the lengths of dashes and gaps
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import yaml

from ..base.resources import resource_root

_OTHER = {"order": 1000, "colour": "#888888", "marker": "D", "line": [2, 2]}


@cache
def _looks() -> dict[str, Mapping]:
    found = {}
    for path in (resource_root() / "conf" / "method").glob("*.yaml"):
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "_look_" in node:
            found[path.stem] = _OTHER | node["_look_"]
    return dict(sorted(found.items(), key=lambda item: (item[1]["order"], item[0])))


def methods() -> list[str]:
    """The methods of conf/method that have a look, in the order of tables."""
    return list(_looks())


def method_order(name: str) -> tuple:
    """Sort key of a method: dense, the methods from the simplest to ALPS, then others by name."""
    return _looks().get(name, _OTHER)["order"], name


def look(name: str) -> tuple:
    """Colour, marker and line style of a method, in matplotlib's terms."""
    found = _looks().get(name, _OTHER)
    return found["colour"], found["marker"], _style(found["line"])


def line_styles() -> list:
    """The line styles of all methods that are drawn, then that of unknown ones."""
    drawn = [look["line"] for look in _looks().values() if look["order"]]
    return [_style(line) for line in (*reversed(drawn), _OTHER["line"])]


def _style(line):
    return "-" if line == "solid" else (0, tuple(line))
