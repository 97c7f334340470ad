"""Classes answer without torch what they answer with it, and what needs torch is not answered."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from alps_exp.base import standins
from alps_exp.cli import helping

_CODE = """
import json, sys
from alps_exp.base.standins import answered, imported
from alps_exp.cli import helping
words = [word for word in sorted(helping._all_keys()) if not word.startswith("eval.")]  # one of which needs torch
help = answered(lambda: json.dumps({word: list(helping.explained(word)) for word in words}))
uses = [
    lambda: str(imported("alps_exp.methods.alps").torch.float32),
    lambda: str(isinstance(0, imported("alps_exp.methods.alps").Tensor)),
    lambda: imported("alps_exp.nowhere").__name__,
    lambda: __import__("torch").__name__,
]
print(json.dumps([help, [answered(use) for use in uses], answered(lambda: "ein Wört"), "torch" in sys.modules]))
"""


@pytest.mark.slow
def test_help_without_torch_is_help_with_it():
    end = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, timeout=60, check=True)
    told, of_torch, plain, imported = json.loads(end.stdout)
    assert of_torch == [None] * 4 and plain == "ein Wört" and not imported and not end.stderr
    told = json.loads(told)
    assert len(told) > 90
    for word, lines in told.items():
        assert lines == list(helping.explained(word)), word


def test_where_torch_is_imported_nothing_stands_in_for_it():
    assert standins.answered(lambda: "an answer") is None
