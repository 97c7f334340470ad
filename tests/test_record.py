import json
import math
from pathlib import Path

import pytest

from alps_exp.record import LayerRow, PruneResult, RunRecord, summarise, warnings_of, write_json


def row(**changes) -> LayerRow:
    fields = {
        "name": "a.0.q",
        "block": 0,
        "shape": [2, 4],
        "pattern": "0.5",
        "selection": "layer",
        "sparsity_target": 0.5,
        "sparsity": 0.5,
        "relative_loss": 0.1,
        "status": "exact",
        "iterations": 0,
        "seconds": 1.0,
        "seconds_by_phase": {},
        "tokens": 100,
        "dead_inputs": 0,
        "stats": {},
    }
    return LayerRow(**{**fields, **changes})


def record() -> RunRecord:
    return RunRecord("running", {"a": 1}, "abc", "m", "alps", "0.5", 0)


def test_summary_weighs_sparsity_by_weights_and_losses_by_layers():
    summary = summarise([row(), row(shape=[6, 4], sparsity=0.9, relative_loss=0.3)])
    assert summary["layers"] == 2 and summary["weights"] == 32 and summary["share"] is None
    assert summarise([row()], 16)["share"] == 0.5
    assert summary["sparsity"] == pytest.approx((0.5 * 8 + 0.9 * 24) / 32)
    assert summary["mean_relative_loss"] == pytest.approx(0.2)
    assert summary["solver_seconds"] == 2.0


def test_losses_that_were_not_measured_are_missing_not_zero():
    assert summarise([row(relative_loss=None)])["mean_relative_loss"] is None


def test_round_trip(tmp_path: Path):
    value = record()
    value.book(PruneResult([row()], {"solve": 2.0}))
    path = value.write(tmp_path)
    read = json.loads(path.read_text())
    assert read["layers"][0]["name"] == "a.0.q" and read["phases"]["solve_seconds"] == 2.0
    assert {"status", "config", "config_hash", "model", "method", "sparsity", "seed", "layers", "phases"} <= set(read)


def test_json_stays_readable_with_infinite_values(tmp_path: Path):
    value = record()
    value.evaluations.append({"value": math.inf})
    text = value.write(tmp_path).read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse)["evaluations"][0]["value"] == "inf"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "record.json"
    write_json(path, {"old": True})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": True}
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_warnings_name_one_layer_and_count_the_rest():
    rows = [row(dead_inputs=2), row(dead_inputs=1, tokens=3), row()]
    dead, few = warnings_of(rows)
    assert dead.startswith("2 layers have inputs that are zero") and "a.0.q: 2 of 4" in dead
    assert few.startswith("1 layers have more inputs than calibration tokens") and "4 inputs, 3 tokens" in few
    assert warnings_of([row()]) == []
