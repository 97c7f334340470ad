"""alps-exp quick and the demo: what they print and leave, on a tiny model in place of the bundled one."""

from __future__ import annotations

import json

import pytest
from tiny import words_for

from alps_exp import demo
from alps_exp.base import packages
from alps_exp.cli import quick
from alps_exp.cli.overrides import compose

SMALL = ["nsamples=2", "seqlen=32", "eval.windows=2", "eval.sample_tokens=4", "eval.prompt=The"]


@pytest.fixture
def words(tiny_llama, text_file, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return words_for(tiny_llama, text_file, *SMALL)


@pytest.mark.slow
def test_quick_shows_a_model_before_and_after_and_leaves_records(words, tmp_path, capsys):
    assert quick.main(words) == 0
    text = capsys.readouterr().out
    records = [json.loads(path.read_text()) for path in tmp_path.glob("results/runs/*/record.json")]
    assert sorted((r["method"], r["status"]) for r in records) == [("dense", "complete"), ("sparsegpt", "complete")]
    (pruned,) = (record for record in records if record["method"] == "sparsegpt")
    assert pruned["config"]["target"]["name"] == "layer" and pruned["sparsity"] == "0.5"
    for record, zeros in zip(sorted(records, key=lambda record: record["method"]), ("none", "0.5"), strict=True):
        (perplexity,) = (row["value"] for row in record["evaluations"])
        (line,) = (line for line in text.splitlines() if line.startswith(f"{zeros} "))
        assert f"{perplexity:.4g}" in line
    assert " ".join(pruned["sample"]["pruned"].split()) in text and "Reduced to take a minute" in text
    assert "Next" in text and "help method" in text and "runs in" not in text  # no table
    assert quick.main(words) == 0  # again: it is run, not found complete


def test_quick_without_the_demos_packages_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    assert quick.main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and packages.INSTALL in error and error.startswith("alps_exp: quick needs")


@pytest.mark.parametrize("word", ["-m", "alps"])
def test_quick_takes_keys_alone(word, capsys):
    assert quick.main([word]) == 2
    assert "quick takes KEY=VALUE alone" in capsys.readouterr().err


def test_what_quick_and_the_demo_ask_for_composes():
    assert compose([*quick.PRUNING, *quick.REDUCED]).method.name == "sparsegpt"
    assert compose(demo.REDUCED).layers.include == ["layers.[0-6].*"]


@pytest.mark.slow
def test_the_demo_ends_in_one_table_of_all_its_runs(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "METHODS", ("dense", "magnitude", "alps"))
    assert demo.main([*words, "eval.sample_tokens=0"]) == 0
    text = capsys.readouterr().out
    assert "4 runs: 0 complete, 4 to run" in text and "run 4 of 4: " in text and "left of the sweep" in text
    table = text[text.index("target") :].splitlines()
    assert sum(line.split()[0] in ("alps", "stream") for line in table if line.split()) == 2
    assert text.rstrip().splitlines()[-1].startswith("The demo took ")
