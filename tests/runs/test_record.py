import json
import math
import re
from pathlib import Path

import pytest

from alps_exp import baselines
from alps_exp.base.errors import UserError
from alps_exp.base.files import write_json
from alps_exp.pruning.rows import LayerRow, PruneResult
from alps_exp.runs import provenance
from alps_exp.runs import record as records
from alps_exp.runs.record import RunRecord, summarise, warnings_of


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
    lost = [
        row(name="b.1.v", relative_loss=2.639e16),
        row(relative_loss=3.0),
        row(relative_loss=4.0, target="stream", target_loss=0.5),
        row(name="c.2.o", relative_loss=0.5, target="stream", target_loss=1.5),
        row(),
    ]
    (worse,) = warnings_of(lost)
    assert worse.startswith("3 layers have a relative loss above 1") and "b.1.v: 2.639e+16" in worse


@pytest.mark.parametrize("content", ["null", "[1]", '{"a"', '{"schema": 2}', "{}", "[" * 100_000], ids=str.__len__)
def test_what_cannot_be_read_is_named_and_kept_aside(tmp_path, content):
    file = tmp_path / "record.json"
    assert records.find(tmp_path) is None and records.set_aside(tmp_path) is None
    for name in ("record.unreadable.json", "record.unreadable-1.json"):
        file.write_text(content)
        with pytest.raises(UserError, match=re.escape(str(file))) as error:
            records.load(file)
        assert "\n" not in str(error.value) and records.find(tmp_path) is None
        assert records.set_aside(tmp_path) == tmp_path / name and (tmp_path / name).read_text() == content
        assert not file.exists()


def test_a_later_form_is_told_as_such(tmp_path):
    path = record().write(tmp_path)
    assert records.load(path)["schema"] == records.SCHEMA
    path.write_text(json.dumps({**records.load(path), "schema": records.SCHEMA + 1}))
    with pytest.raises(UserError, match=r"by a later version .* update alps_exp"):
        records.load(path)


def test_the_code_digest_covers_every_folder(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "one.py").write_text("1")
    found = [provenance.code_digest([tmp_path])]

    def changed() -> bool:
        found.append(provenance.code_digest([tmp_path]))
        return found[-1] != found[-2]

    (tmp_path / "deep" / "er" / "new.py").write_text("2")
    assert changed()
    (tmp_path / "deep" / "er" / "new.py").rename(tmp_path / "deep" / "new.py")
    assert changed()
    (tmp_path / "deep" / "demo.py").write_text("3")  # only the package's own module of that name makes no results
    assert changed()
    (tmp_path / "demo.py").write_text("4")
    assert not changed()
    package = Path(provenance.__file__).parents[1]
    assert provenance.code_digest([package, *map(Path, baselines.__path__)])[:12] in provenance.code_version()
