"""What W&B receives, read back from an offline run, and that its failures never reach the result."""

import json
import math
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from alps_exp.base.errors import UserError
from alps_exp.cli.overrides import compose
from alps_exp.runs import loggers
from alps_exp.runs.loggers import LoggerSettings, log_record, resolve

RECORD = {
    "status": "complete",
    "config": {"seed": 3, "method": {"name": "alps", "rho": 0.1}},
    "config_hash": "0123abcd",
    "model": "tiny",
    "method": "alps",
    "sparsity": "2:4",
    "seed": 3,
    "layers": [
        {"name": "a.0.q", "block": 0, "relative_loss": 0.25, "sparsity": 0.5, "iterations": 7, "seconds": 1.5},
        {"name": "a.1.q", "block": 1, "relative_loss": 0.125, "sparsity": 0.5, "iterations": 8, "seconds": 2.5},
    ],
    "summary": {"layers": 2, "mean_relative_loss": 0.1875},
    "phases": {"solve_seconds": 4.0},
    "evaluations": [
        {"dataset": "wikitext2", "metric": "perplexity", "value": 20.5},
        {"dataset": "ptb", "metric": "perplexity", "value": 30.5, "partial": True},
    ],
    "environment": {"device": "CPU", "versions": {"torch": "2"}},
}


def node(*overrides: str) -> LoggerSettings:
    return resolve(compose(["logger=wandb", *overrides]).logger)


def entries(path: Path) -> Iterator[bytes]:
    """Entries of a .wandb file: a 7-byte header, then LevelDB's log format (blocks of 32 KiB; each piece has a CRC, a
    length and a type: 1 whole, 2 first, 3 middle, 4 last)."""
    data, position, parts = path.read_bytes(), 7, []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def read_back(folder: Path) -> dict:
    """History rows, summary and config of the one offline run below a folder."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("*.wandb")
    # W&B's own process may still be writing when finish() has returned.
    size, deadline = -1, time.monotonic() + 10
    while path.stat().st_size != size and time.monotonic() < deadline:
        size = path.stat().st_size
        time.sleep(1)
    found = {"history": [], "summary": {}, "config": {}}
    for data in entries(path):
        entry = wandb_internal_pb2.Record()
        entry.ParseFromString(data)
        kind = entry.WhichOneof("record_type")
        if kind == "history":
            found["history"].append(_items(entry.history.item))
        elif kind == "summary":
            found["summary"] |= _items(entry.summary.update)
        elif kind == "run":
            found["id"], found["project"] = entry.run.run_id, entry.run.project
            found["config"] |= _items(entry.run.config.update)
    return found


def _items(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.mark.slow
def test_an_offline_run_holds_the_record(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert log_record(RECORD, node("logger.mode=offline", "logger.project=pruning"), tmp_path) is None
    found = read_back(tmp_path)
    assert found["id"] == "0123abcd" and found["project"] == "pruning"
    assert found["config"]["method"] == {"name": "alps", "rho": 0.1}
    assert [row["layer/relative_loss"] for row in found["history"]] == [0.25, 0.125]
    assert [row["layer/index"] for row in found["history"]] == [0, 1]
    assert [row["layer/seconds"] for row in found["history"]] == [1.5, 2.5]
    assert found["summary"]["eval/wikitext2/perplexity"] == 20.5
    assert found["summary"]["eval/ptb/perplexity (partial)"] == 30.5
    assert found["summary"]["phase/solve_seconds"] == 4.0 and found["summary"]["mean_relative_loss"] == 0.1875


@pytest.mark.slow
def test_disabled_and_none_write_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert log_record(RECORD, node("logger.mode=disabled"), tmp_path) is None
    assert log_record(RECORD, resolve(compose(["logger=none"]).logger), tmp_path) is None
    assert not list(tmp_path.rglob("*.wandb"))


def test_a_failure_is_one_line_and_no_exception(tmp_path, monkeypatch, capsys):
    import wandb

    def refuse(**options):
        raise wandb.errors.UsageError("api_key not configured\nmore lines")

    monkeypatch.setattr(wandb, "init", refuse)
    line = log_record(RECORD, node(), tmp_path)
    assert "api_key not configured" in line and "\n" not in line
    assert "record is complete without it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_the_environment_variable_works_without_an_account(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert log_record(RECORD, node(), tmp_path) is None
    assert bool(list(tmp_path.rglob("*.wandb"))) == (mode == "offline")


@pytest.mark.slow
def test_a_network_that_is_away_is_waited_for_once(tmp_path, monkeypatch, capsys):
    import wandb

    monkeypatch.delenv("WANDB_MODE", raising=False)
    asked = []

    def away(**options):
        asked.append(options["mode"])
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", away)
    for _ in range(3):
        assert "no network" in log_record(RECORD, node(), tmp_path)
    assert len(asked) == 1 and capsys.readouterr().err.count("\n") == 3
    log_record(RECORD, node("logger.mode=offline"), tmp_path)  # which needs none
    assert asked == [None, "offline"]


@pytest.mark.slow
def test_what_is_not_finite_reaches_it_as_a_number(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    infinite = {**RECORD, "evaluations": [{"dataset": "ptb", "metric": "perplexity", "value": "inf"}]}
    assert log_record(infinite, node("logger.mode=offline"), tmp_path) is None
    assert read_back(tmp_path)["summary"]["eval/ptb/perplexity"] in (math.inf, "Infinity")


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("logger.project=a/b", "cannot contain"),
        ("logger.project=null", "logger.project=None"),
        ("logger.tags=abc", "logger.tags=abc"),
        ("logger.tags=['']", "Tag"),
        ("logger.tags=[3]", "tag"),
        ("logger.mode=onlin", "did you mean"),
    ],
)
def test_settings_are_checked_before_the_run(word, told):
    with pytest.raises(UserError, match=re.escape(told)) as error:
        node(word)
    assert "\n" not in str(error.value)


def test_the_environments_mode_is_checked_before_the_run(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(UserError, match="WANDB_MODE"):
        node()


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch):
    monkeypatch.setattr(loggers, "_unreachable", [])
