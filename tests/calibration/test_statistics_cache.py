"""Statistics shared between runs: the same bits as without, and never those of other inputs."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from helpers import out_of_memory
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import execute, weights, words_for

from alps_exp.base.errors import UserError
from alps_exp.calibration import sharing, streams
from alps_exp.calibration.capture import Collector, Group
from alps_exp.calibration.sharing import StatisticsCache
from alps_exp.cli.overrides import compose
from alps_exp.layer.inputs import Inputs, Statistics
from alps_exp.model.hidden import HiddenStates
from alps_exp.runs.settings import resolve
from alps_exp.runs.workspace import Workspace

DENSE = "propagate=dense"


@pytest.fixture
def settings(tiny_gemma3, text_file, tmp_path) -> list[str]:
    model = shutil.copytree(tiny_gemma3, tmp_path / "gemma")
    return words_for(model, text_file, "nsamples=6", "seqlen=48", "eval=none", "batch_size=2", "statistics_cache=1")


def sets(folder: Path) -> list[Path]:
    return sorted((folder / ".statistics").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "cached"),
    [
        ([DENSE, "data.holdout=2"], [0, 1, 2]),
        ([DENSE, "stream=true"], [0, 1, 2]),
        (["propagate=pruned"], [0]),
    ],
)
def test_the_same_bits_as_without(settings, tmp_path, more, cached):
    more, workspace = [*more, "save=true"], Workspace(keep=True)
    # Magnitude collects Gram matrices for its losses, and the moments that DSnoT needs for those that follow.
    cells = (("magnitude", "0.5", []), ("dsnot", "0.7", cached), ("sparsegpt", "2:4", cached))
    for number, (method, sparsity, expected) in enumerate(cells):
        words = [f"method={method}", f"sparsity={sparsity}", *more]
        one = execute(settings, tmp_path / "shared" / str(number), *words, workspace=workspace)
        alone = [*words, "statistics_cache=0"]
        other = execute(settings, tmp_path / "alone" / str(number), *alone, workspace=workspace)
        assert (one["cached_blocks"], other["cached_blocks"]) == (expected, [])
        assert one["config_hash"] == other["config_hash"]
        for row, without in zip(one["layers"], other["layers"], strict=True):
            for key in ("name", "relative_loss", "held_out_loss", "tokens", "dead_inputs", "sparsity"):
                assert row[key] == without[key], key
        mine, theirs = (weights(tmp_path / folder / str(number)) for folder in ("shared", "alone"))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert len(sets(tmp_path / "shared")) == 1 and not sets(tmp_path / "alone")


@pytest.mark.slow
def test_no_window_is_forwarded_where_all_is_known(settings, tmp_path, monkeypatch):
    execute(settings, tmp_path / "one", "method=wanda", DENSE)
    monkeypatch.setattr(streams, "HiddenStates", lambda *_: pytest.fail("windows were embedded"))
    record = execute(settings, tmp_path / "two", "method=sparsegpt", DENSE)
    assert record["environment"]["hidden_states"] is None and record["phases"]["calibrate_seconds"] > 0
    only_first = ["layers.include=[layers.0.*]"]
    monkeypatch.undo()
    execute(settings, tmp_path / "three", "method=wanda", *only_first)
    monkeypatch.setattr(streams, "HiddenStates", lambda *_: pytest.fail("windows were embedded"))
    assert execute(settings, tmp_path / "four", "method=sparsegpt", *only_first)["cached_blocks"] == [0]


@pytest.mark.slow
def test_windows_go_no_further_than_the_last_unknown_block(settings, tmp_path, monkeypatch):
    expected = execute(settings, tmp_path / "one", "method=wanda", DENSE)
    (sets(tmp_path)[0] / "block-00001.safetensors").unlink()
    advanced, original = [], HiddenStates.advance
    monkeypatch.setattr(
        HiddenStates, "advance", lambda self, *rest: [advanced.append(rest[1]), original(self, *rest)][1]
    )
    record = execute(settings, tmp_path / "two", "method=wanda", DENSE)
    assert advanced == [0] and record["cached_blocks"] == [0, 2]
    assert [row["relative_loss"] for row in record["layers"]] == [row["relative_loss"] for row in expected["layers"]]


@pytest.mark.slow
def test_a_diagonal_is_not_taken_from_a_gram_matrix(settings, tmp_path):
    workspace, every = Workspace(keep=True), [0, 1, 2]
    cells = [("wanda", "true", []), ("wanda", "false", []), ("dsnot", "false", every), ("wanda", "false", every)]
    for number, (method, losses, cached) in enumerate([*cells, ("sparsegpt", "true", every)]):
        words = [f"method={method}", DENSE, f"losses={losses}"]
        assert execute(settings, tmp_path / str(number), *words, workspace=workspace)["cached_blocks"] == cached


@pytest.mark.slow
def test_what_is_missing_is_added(settings, tmp_path):
    workspace = Workspace(keep=True)
    for number, (method, losses, cached) in enumerate(
        [("wanda", "false", []), ("dsnot", "false", []), ("wanda", "true", []), ("dsnot", "false", [0])]
    ):
        words = [f"method={method}", f"losses={losses}", "layers.include=[layers.0.*]"]
        assert execute(settings, tmp_path / str(number), *words, workspace=workspace)["cached_blocks"] == cached


@pytest.mark.slow
def test_other_inputs_have_statistics_of_their_own(settings, tmp_path, monkeypatch):
    settings = [*settings, "method=wanda", "layers.include=[layers.0.*]"]
    changes = ["nsamples=5", "seqlen=32", "seed=1", "batch_size=3", "dtype=bfloat16", "layers.exclude=[k_proj]"]
    changes += ["data.holdout=2", "time", "code"]
    workspace = Workspace(keep=True)
    execute(settings, tmp_path / "one", workspace=workspace)
    for number, change in enumerate(changes):
        with monkeypatch.context() as patch:
            if change == "code":
                patch.setattr("alps_exp.runs.provenance._software", lambda: {"code": "0.0"})
            if change == "time":  # of the files, whose content seems to be the same
                os.utime(
                    Path(settings[1].removeprefix("model.path=").strip("'")) / "model.safetensors", (1, time.time() + 5)
                )
            words = [change] if "=" in change else []
            record = execute(settings, tmp_path / str(number), *words, workspace=workspace)
        assert record["cached_blocks"] == [] and len(sets(tmp_path)) == 2 + number, change


@pytest.mark.slow
def test_in_sweeps_only_unless_asked(settings, tmp_path):
    settings = [*settings[:-1], "method=wanda"]
    execute(settings, tmp_path / "single")
    assert not sets(tmp_path)
    workspace = Workspace(keep=True)
    for number, cached in enumerate(([], [0])):
        assert execute(settings, tmp_path / str(number), workspace=workspace)["cached_blocks"] == cached
    record = execute(settings, tmp_path / "none", "method=magnitude", "losses=false", workspace=workspace)
    assert record["cached_blocks"] == [] and len(sets(tmp_path)) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["statistics_cache=-1"], "statistics_cache=-1"),
        (["statistics_cache=many"], "statistics_cache=many is not allowed: give auto"),
        (["devices=2"], "statistics_cache=1 goes with one process"),
    ],
)
def test_values_that_are_refused(settings, words, message):
    with pytest.raises(UserError, match=message):
        resolve(compose([*settings, *words]))


def cache(root: Path, name: str, limit: float = 1e9, needed: Statistics = Statistics.GRAM) -> StatisticsCache:
    return StatisticsCache(root, {"name": name}, True, needed, False, limit)


def groups(value: float, width: int = 64) -> list:
    gram = torch.full((width, width), float(value))
    return [Group(["q", "k"], Inputs(gram=gram, tokens=5, sequences=1, name="q"))]


def test_the_least_recently_used_set_makes_room_but_none_in_use(tmp_path):
    size, limit = 64 * 64 * 4, 3.5 * 64 * 64 * 4
    for number, name in enumerate("abc"):
        one = cache(tmp_path, name, limit)
        one.keep(0, groups(number))
        one.close()
        os.utime(one._folder, (number, number))
    held = cache(tmp_path, "a", limit)  # used now, though it was the first
    new = cache(tmp_path, "d", limit)
    new.keep(0, groups(3))
    assert held.holds(0) and new.holds(0) and not new.notes
    names = {(folder / "identity.json").read_text()[10] for folder in tmp_path.iterdir()}
    assert names == {"a", "c", "d"}
    os.utime(held._folder, (1, 1))
    new.keep(1, groups(4))
    assert held.holds(0), "its lock is held"
    assert {(folder / "identity.json").read_text()[10] for folder in tmp_path.iterdir()} == {"a", "d"}
    new.keep(2, groups(5))
    assert new.notes and not new.holds(2), "no set is left that could go"
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) <= limit
    assert size * 3 <= limit


def _work(root: str, seed: int, failures) -> None:
    """Read and write sets as several runs would; what is read must be what belongs to the set."""
    generator = random.Random(seed)
    try:
        for _ in range(60):
            number = generator.randrange(4)
            one = cache(Path(root), str(number), limit=2.6 * 64 * 64 * 4)
            index = generator.randrange(2)
            found = one.load(index, torch.device("cpu"))
            if found is None:
                one.keep(index, groups(10 * number + index))
            elif found[0].names != ["q", "k"] or not torch.equal(
                found[0].inputs.gram, groups(10 * number + index)[0].inputs.gram
            ):
                failures.put(f"{number}, {index}: {found}")
            one.close()
    except BaseException as error:
        failures.put(repr(error))


@pytest.mark.slow
def test_several_processes_read_write_and_evict(tmp_path):
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    workers = [context.Process(target=_work, args=(str(tmp_path), seed, failures)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert failures.empty(), failures.get()
    assert all(worker.exitcode == 0 for worker in workers)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("act", [sharing._hold, sharing._remove])
def test_a_set_that_others_made_anew_before_it_was_locked_is_theirs(act, tmp_path, monkeypatch):
    folder, held = tmp_path / ("a" * 32), []
    folder.mkdir()
    written = folder / ".block-00000.safetensors.7.tmp"
    lock = sharing.lock

    def late(descriptor: int, **options):
        if not held:
            shutil.rmtree(folder)
            folder.mkdir()
            held.append(os.open(folder, os.O_RDONLY))
            assert lock(held[0], shared=True)
            written.write_bytes(b"half")
        return lock(descriptor, **options)

    monkeypatch.setattr(sharing, "lock", late)
    found = act(folder)
    assert written.exists()
    assert found == 0 if act is sharing._remove else os.path.samestat(os.fstat(found), folder.stat())
    for descriptor in [*held, *([found] if act is sharing._hold else [])]:
        os.close(descriptor)


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    one = cache(tmp_path, "a")
    left = one._folder / ".block-00000.safetensors.7.tmp"
    left.write_bytes(b"half")
    second = cache(tmp_path, "a")
    assert left.exists(), "another process may be writing it"
    one.close(), second.close()
    cache(tmp_path, "a").close()
    assert not left.exists()


@pytest.mark.slow
def test_on_a_full_disk_the_run_goes_on(settings, tmp_path, monkeypatch):
    def full(tensors, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sharing, "save_file", full)
        record = execute(settings, tmp_path / "one", "method=wanda", DENSE)
    assert record["status"] == "complete"
    assert [line for line in record["warnings"] if "not kept for other runs" in line and "No space" in line]
    assert [path.name for path in sets(tmp_path)[0].iterdir()] == ["identity.json"]


@pytest.mark.slow
def test_what_is_cut_short_is_collected_again(settings, tmp_path):
    execute(settings, tmp_path / "one", "method=wanda", DENSE)
    for file in sets(tmp_path)[0].glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    assert execute(settings, tmp_path / "two", "method=sparsegpt", DENSE)["cached_blocks"] == []
    assert execute(settings, tmp_path / "three", "method=wanda", DENSE, "sparsity=0.5")["cached_blocks"] == [0, 1, 2]


def flip(file: Path) -> None:
    """Another exponent for the first number of a file."""
    content = bytearray(file.read_bytes())
    content[int.from_bytes(content[:8], "little") + 8 + 2] ^= 0x40
    file.write_bytes(content)


def other_metadata(file: Path, **metadata: str) -> None:
    save_file(load_file(file), file, metadata=metadata or None)


def own_metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        other_metadata,
        lambda file: other_metadata(file, format="pt"),
        lambda file: other_metadata(file, groups="[1", sha256="0"),
        lambda file: other_metadata(file, **own_metadata(file) | {"groups": '[[["q"], {}]]'}),
        lambda file: shutil.copy(file.with_name("block-00001.safetensors"), file),
        lambda file: file.write_text("no safetensors"),
        lambda file: (file.unlink(), file.mkdir()),
    ],
    ids=["bit", "no metadata", "foreign", "unreadable", "other layers", "another block", "text", "a folder"],
)
def test_what_is_not_as_it_was_written_is_as_good_as_none(tmp_path, damage):
    one = cache(tmp_path, "a")
    one.keep(0, groups(1)), one.keep(1, groups(2))
    assert one.holds(0) and one.holds(1)
    damage(one._file(0))
    for again in (one, cache(tmp_path, "a")):
        assert not again.holds(0) and again.load(0, torch.device("cpu")) is None and again.holds(1)
    one.keep(0, groups(3))
    if one._file(0).is_file():
        assert torch.equal(one.load(0, torch.device("cpu"))[0].inputs.gram, groups(3)[0].inputs.gram)
    else:
        assert "block 0" in one.notes[0] and not one.holds(0)


@pytest.mark.slow
def test_a_flipped_bit_changes_no_result(settings, tmp_path):
    expected = execute(settings, tmp_path / "one", "method=sparsegpt", "save=true")
    flip(sets(tmp_path)[0] / "block-00000.safetensors")
    for name, cached in (("two", []), ("three", [0])):  # collected again, and kept again
        record = execute(settings, tmp_path / name, "method=sparsegpt", "save=true")
        assert (record["status"], record["cached_blocks"]) == ("complete", cached)
        assert [row["relative_loss"] for row in record["layers"]] == [
            row["relative_loss"] for row in expected["layers"]
        ]
        one, other = weights(tmp_path / "one"), weights(tmp_path / name)
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("obstruct", "told"),
    [
        (lambda place: place.symlink_to("/nowhere/at/all"), "is a link that leads nowhere"),
        (lambda place: place.write_text("a file"), "is a file, where a folder is needed"),
    ],
    ids=["dangling link", "file"],
)
def test_what_stands_in_place_of_the_folder_is_told_once(settings, tmp_path, capsys, obstruct, told):
    obstruct(tmp_path / ".statistics")
    for name in ("one", "two"):
        record = execute(settings, tmp_path / name, "method=wanda")
        assert record["status"] == "complete" and record["cached_blocks"] == []
    lines = [line for line in capsys.readouterr().err.splitlines() if "not shared" in line]
    assert len(lines) == 1 and told in lines[0] and str(tmp_path / ".statistics") in lines[0]


def test_what_stands_in_place_of_a_set_is_told(tmp_path):
    place = cache(tmp_path, "a")._folder
    shutil.rmtree(place)
    place.symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match="a link that leads nowhere"):
        cache(tmp_path, "a")


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_bytes(b"x" * 100_000)
    one = cache(tmp_path, "a", limit=1.5 * 64 * 64 * 4)
    one.keep(0, groups(1)), one.keep(1, groups(2))
    assert (tmp_path / "notes" / "mine.txt").exists() and one.holds(0) and not one.holds(1)


@pytest.mark.slow
def test_a_file_that_is_lost_on_the_way_is_named_and_the_same_command_goes_on(settings, tmp_path, monkeypatch):
    execute(settings, tmp_path / "one", "method=wanda", DENSE)
    expected = execute(settings, tmp_path / "alone", "method=sparsegpt", DENSE, "statistics_cache=0", "save=true")
    original = StatisticsCache.load

    def losing(self, index, device, needed):
        if index == 1:
            self._file(1).write_bytes(b"nothing")
        return original(self, index, device, needed)

    with monkeypatch.context() as patch:
        patch.setattr(StatisticsCache, "load", losing)
        with pytest.raises(UserError, match=r"block-00001\.safetensors was whole .* the same command goes on"):
            execute(settings, tmp_path / "two", "method=sparsegpt", DENSE, "save=true")
    record = execute(settings, tmp_path / "two", "method=sparsegpt", DENSE, "save=true")
    assert record["attempts"] == 2 and record["cached_blocks"] == [2]
    assert [row["relative_loss"] for row in record["layers"]] == [row["relative_loss"] for row in expected["layers"]]
    one, other = weights(tmp_path / "two"), weights(tmp_path / "alone")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.slow
def test_statistics_that_do_not_fit_on_the_device_wait_in_host_memory(settings, tmp_path, monkeypatch):
    expected, asked = execute(settings, tmp_path / "one", "method=wanda", DENSE), []
    out_of_memory(monkeypatch, StatisticsCache, "load", lambda *_: asked.append(1) or len(asked) == 2)
    record = execute(settings, tmp_path / "two", "method=wanda", DENSE)
    assert len(asked) == 4 and record["cached_blocks"] == [0, 1, 2]
    assert [row["relative_loss"] for row in record["layers"]] == [row["relative_loss"] for row in expected["layers"]]


@pytest.mark.slow
def test_nothing_is_kept_once_memory_has_run_short(settings, tmp_path, monkeypatch):
    calls = []
    with monkeypatch.context() as patch:
        out_of_memory(patch, Collector, "begin", lambda *_: calls.append(1) or len(calls) == 5)
        record = execute(settings, tmp_path / "one", "method=wanda", DENSE)
    assert any("ran short" in line for line in record["warnings"])
    assert [file.name for file in sets(tmp_path)[0].glob("*.safetensors")] == ["block-00000.safetensors"]
