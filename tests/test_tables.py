import json
from pathlib import Path

import pandas as pd
import pytest

from alps_exp import tables
from alps_exp.errors import UserError


def record(method: str, sparsity: str = "2:4", loss: float | None = 0.1, perplexity: float = 20.0) -> dict:
    return {
        "model": "tiny_model",
        "method": method,
        "sparsity": sparsity,
        "seed": 0,
        "status": "complete",
        "summary": {"sparsity": 0.5, "mean_relative_loss": loss} if loss is not None else {},
        "phases": {"calibrate_seconds": 1.0, "solve_seconds": 2.5} if loss is not None else {"load_seconds": 9.0},
        "evaluations": [
            {"dataset": "wikitext2", "metric": "perplexity", "value": perplexity, "windows": 10, "seqlen": 2048}
        ],
    }


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for index, item in enumerate([record("alps"), record("dense", "0", None), record("magnitude", loss=0.4)]):
        path = tmp_path / "runs" / str(index) / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(item))
    copy = tmp_path / "runs" / "0" / "model" / "record.json"
    copy.parent.mkdir()
    copy.write_text(json.dumps(record("alps")))
    return tmp_path / "runs"


def test_comparison_reads_every_run_once_in_a_fixed_order(runs):
    frame = tables.comparison(tables.read_records(runs))
    assert list(frame["method"]) == ["dense", "magnitude", "alps"]
    assert frame["wikitext2 perplexity (10 × 2048)"].tolist() == [20.0] * 3
    assert frame["seconds"].iloc[2] == 3.5 and pd.isna(frame["seconds"].iloc[0])


def test_a_perplexity_of_some_windows_says_so():
    some = record("alps")
    some["evaluations"][0] |= {"partial": True, "total_windows": 141}
    assert "wikitext2 perplexity (10 of 141 × 2048)" in tables.comparison([some]).columns


def test_files_are_the_same_bytes_each_time(runs, tmp_path, capsys):
    contents = []
    for folder in ("one", "other"):
        assert tables.main([str(runs), str(tmp_path / folder)]) == 0
        contents.append({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()})
    assert contents[0] == contents[1] and set(contents[0]) == {f"comparison.{kind}" for kind in ("md", "csv", "tex")}
    assert "| alps " in capsys.readouterr().out
    markdown, latex = contents[0]["comparison.md"].decode(), contents[0]["comparison.tex"].decode()
    assert "| –" in markdown and "0.4" in markdown
    assert r"tiny\_model" in latex and r"\toprule" in latex
    assert len(pd.read_csv(tmp_path / "one" / "comparison.csv")) == 3


def test_nothing_to_tabulate(tmp_path, capsys):
    assert tables.main([str(tmp_path), str(tmp_path / "tables")]) == 2
    assert "run something first" in capsys.readouterr().err and not (tmp_path / "tables").exists()


def test_a_broken_record_is_named(runs):
    (runs / "1" / "record.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"1/record\.json is not a readable record"):
        tables.read_records(runs)


def test_a_foreign_file_of_that_name_is_named(runs, tmp_path, capsys):
    (runs / "1" / "record.json").write_text('{"a": 1}')
    assert tables.main([str(runs), str(tmp_path / "tables")]) == 2
    error = capsys.readouterr().err
    assert "is no run record" in error and error.count("\n") == 1
