"""alps-exp list, show and diff."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import table_records

from alps_exp.tables.looking import main, picture


@pytest.fixture
def runs(tmp_path) -> Path:
    given = {
        "one": table_records.record("alps", perplexity=20.0, loss=0.1),
        "two": table_records.record("wanda", perplexity=30.0, loss=0.3, seed=1),
        "three": table_records.record("alps", "2:4", perplexity=9.5, loss=0.2, warnings=["the text is short"]),
        "four": table_records.record("alps", "0.8", status="failed", error={"type": "UserError", "message": "no room"}),
    }
    for name, record in given.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps(record))
    return tmp_path


def listed(capsys, runs, *words: str) -> list[str]:
    assert main(["list", *words, "--runs", str(runs), "--json"]) == 0
    return [row["run"] for row in json.loads(capsys.readouterr().out)]


def test_list_filters_and_sorts(runs, capsys):
    assert sorted(listed(capsys, runs)) == ["four", "one", "three", "two"]
    assert sorted(listed(capsys, runs, "method=alps", "status=complete")) == ["one", "three"]
    assert listed(capsys, runs, "status=complete", "--sort=-relative loss") == ["two", "three", "one"]
    assert listed(capsys, runs, "status=complete", "--sort", "-relative") == ["two", "three", "one"]
    assert listed(capsys, runs, "status=complete", "--sort", "wiki") == ["three", "one", "two"]
    assert listed(capsys, runs, "status=complete", "--sort", "sparsity")[-1] == "three"
    assert listed(capsys, runs, "nsamples=128", "method=w*") == ["two"]
    assert main(["list", "--runs", str(runs)]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0].split()[:5] == ["run", "status", "model", "method", "sparsity"]
    assert len(text) == 5
    assert "wikitext2 perplexity (2048)" in text[0]


def test_list_without_runs(tmp_path, capsys):
    assert main(["list", "--runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no runs\n"


def test_show_tells_the_worst_layers_first(runs, capsys):
    assert main(["show", "thr", "--runs", str(runs)]) == 0
    text = capsys.readouterr().out
    assert text.index("b.1.q") < text.index("b.0.q")
    assert "warning: the text is short" in text
    assert "calibrate 1.0, solve 2.5" in text
    assert "relative loss by block, 0.1 to 0.3\n▁█" in text
    assert main(["show", str(runs / "four"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["error"]["message"] == "no room"


def test_show_tells_what_finishing_and_training_brought(runs, capsys):
    record = json.loads((runs / "one" / "record.json").read_text())
    same = {"tokens": 64, "curve": []}
    rows = [{"before": 0.3, "after": 0.1, "steps": 4} | same, {"before": 0.5, "after": 0.2, "steps": 8} | same]
    record["finish"] = {"blocks": rows, "distil": {"before": 2.0, "after": 1.5, "steps": 7} | same}
    record["training"] = {"before": None, "after": None, "steps": 3} | same
    (runs / "one" / "record.json").write_text(json.dumps(record))
    assert main(["show", "one", "--runs", str(runs)]) == 0
    lines = {line[:17].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert lines["blocks finished"].endswith("error on held-out windows 0.4 → 0.15 in 12 steps")
    assert lines["distilled"].endswith("divergence on held-out windows 2 → 1.5 in 7 steps") and "trained" not in lines


def test_diff_tells_what_differs(runs, capsys):
    assert main(["diff", "one", "two", "--runs", str(runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["configuration"] == {"method": ["alps", "wanda"], "method.name": ["alps", "wanda"], "seed": ["0", "1"]}
    assert found["metrics"]["wikitext2 perplexity (2048)"] == [20.0, 30.0]
    assert found["loss by block"] == [pytest.approx([0.05, 0.15]), pytest.approx([0.15, 0.45])]
    assert main(["diff", "one", "one", "--runs", str(runs)]) == 0
    text = capsys.readouterr().out
    assert "the configurations are equal" in text
    assert "1.000" in text
    assert main(["diff", "one", "four", "--runs", str(runs)]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "nothing"], "there is no one run 'nothing'"),
        (["show", "t"], "2 begin so"),
        (["diff", "one", "zero"], "there is no one run 'zero'"),
        (["list", "method"], "method is no filter: give KEY=GLOB"),
        (["list", "methud=alps"], "did you mean method"),
        (["list", "--sort", "nothing"], "--sort nothing: no such column; known:"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_line(runs, capsys, words, message):
    assert main([*words, "--runs", str(runs)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("alps_exp: ")
    assert message in error
    assert error.count("\n") == 1


def test_damaged_records_are_named_and_left_out(runs, capsys):
    (runs / "one" / "record.json").write_text("{")
    assert main(["list", "--runs", str(runs)]) == 0
    streams = capsys.readouterr()
    assert "one" in streams.err
    assert len(streams.out.splitlines()) == 4


def test_a_picture_is_no_wider_than_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    assert picture([1.0, 2.0, 3.0]) == "▁▅█"
    assert len(picture([float(value) for value in range(35)])) == 9
    assert picture([2.0, 2.0]) == "▁▁"
    assert picture([1.0, float("inf"), 2.0]) == "▁██"


@pytest.mark.slow
def test_the_command_line_knows_them(runs):
    words = [sys.executable, "-m", "alps_exp", "list", "method=wanda", "--runs", str(runs)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "two" in done.stdout
