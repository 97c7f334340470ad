"""Weights, losses and perplexities stay what they were: bits.py says how, bits.json what they were."""

import json

import bits
import pytest
from helpers import Forked

from alps_exp.runs import together

pytestmark = pytest.mark.slow
KEPT = json.loads(bits.KEPT.read_text(encoding="utf-8"))
NAMES = [*bits.SINGLE, *bits.KILLED, *bits.SHARED]


def test_every_run_is_kept():
    assert sorted(KEPT["runs"]) == sorted(NAMES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bits")
    bits.prepare(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_run_gives_what_it_gave(name, folder, monkeypatch):
    monkeypatch.setattr(together, "_start", Forked)
    ((_, found),) = bits.measure(folder, [name])
    assert bits.differences(name, found, KEPT) == []


def test_a_streamed_run_has_the_weights_of_the_one_in_memory():
    runs = KEPT["runs"]
    for name in ("alps 0.7", "sparsegpt 2:4"):
        assert runs[name] == runs[f"{name} streamed"]


def test_two_processes_reach_the_loss_of_one():
    """Rounding may lead to another support."""
    (one,), (two,) = (KEPT["runs"][f"alps 0.7{more}"]["plain"].values() for more in ("", " devices=2"))
    assert two["loss"] == pytest.approx(one["loss"], rel=0.01)


def test_a_difference_is_told():
    wrong = json.loads(json.dumps(KEPT["runs"]["dense"])) | {"weights": "0" * 16}
    here = {**KEPT, "machine": bits.machine()}
    assert "dense: weights" in bits.differences("dense", wrong, here)[0]
    wrong["plain"]["dense 0"]["values"][0] *= 1.1
    assert "another machine" in bits.differences("dense", wrong, {**KEPT, "machine": {}})[0]
