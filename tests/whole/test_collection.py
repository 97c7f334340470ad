"""pytest-xdist's workers collect the tests each for itself, and run none where one finds others than another."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.slow  # collects all files once more
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="xdist compares what its workers have collected")
def test_another_process_collects_the_same_tests(request):
    """Later, and with other hashes of texts: what this process has collected, in the same order (a choice by -k apart).

    Alone it says nothing of the others; `.venv/bin/python -m pytest -k collects_the_same` collects them all.
    """
    here = [item.nodeid for item in request.session.items]
    files = list(dict.fromkeys(name.split("::")[0] for name in here))
    options = ["--collect-only", "-p", "no:xdist", "-p", "no:cacheprovider", "--rootdir", request.config.rootpath]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-m", "pytest", *options, *files]
    result = subprocess.run(command, cwd=request.config.rootpath, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
    there = [line for line in result.stdout.splitlines() if "::" in line]
    assert set(here) <= set(there), f"found here only: {[name for name in here if name not in set(there)][:3]}"
    assert here == [name for name in there if name in set(here)], "found in another order"


def test_tests_lie_in_the_folders_of_what_they_test_and_do_without_each_other():
    files = list((ROOT / "tests").rglob("test_*.py"))
    packages = {path.parent.name for path in (ROOT / "alps_exp").glob("*/__init__.py")}
    assert {str(path.parent.relative_to(ROOT / "tests")) for path in files} <= packages | {"baselines", "whole"}
    assert len({path.name for path in files}) == len(files), "pytest takes two files of one name for one module"
    assert not [path for path in files if re.search(r"^\s*(from|import) test_", path.read_text("utf-8"), re.MULTILINE)]
