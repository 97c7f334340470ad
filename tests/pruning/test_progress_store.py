"""Finished blocks on disk: what is whole is used again, what is not is noticed."""

import json
from pathlib import Path

import pytest
import torch

from alps_exp.base.errors import UserError
from alps_exp.pruning.rows import LayerRow
from alps_exp.pruning.store import FinishedBlock, ProgressStore, locked

IDENTITY = {"configuration": "abc", "code": "1"}


def row(name: str, block: int) -> LayerRow:
    return LayerRow(
        name=name,
        block=block,
        shape=[2, 3],
        pattern="0.5",
        selection="layer",
        sparsity_target=0.5,
        sparsity=0.5,
        relative_loss=0.1 + 0.2,
        status="exact",
        iterations=0,
        seconds=1 / 3,
        seconds_by_phase={},
        tokens=7,
        dead_inputs=0,
        stats={"rho": 0.1},
    )


def block(index: int) -> FinishedBlock:
    return FinishedBlock([row(f"blocks.{index}.fc", index)], {"solve": 0.1}, [2, 1])


def weights(index: int) -> dict[str, torch.Tensor]:
    return {f"blocks.{index}.fc.weight": torch.full((2, 3), float(index))}


@pytest.fixture
def store(tmp_path) -> ProgressStore:
    store = ProgressStore(tmp_path, IDENTITY)
    store.open()
    for index in range(3):
        store.finish(index, weights(index), block(index))
    store.wait()
    return store


def reopened(store: ProgressStore) -> ProgressStore:
    again = ProgressStore(store.folder.parent, IDENTITY)
    again.open()
    return again


def test_finished_blocks_come_back_as_they_were(store):
    again = reopened(store)
    assert again.finished == [block(0), block(1), block(2)] and again.attempts == 2


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_a_damaged_block_and_those_after_it_are_made_again(store, damage, suffix):
    damage(store.folder / f"block-00001.{suffix}")
    assert reopened(store).finished == [block(0)]
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "block-00000.json",
        "block-00000.safetensors",
        "run.json",
    ]


def test_a_journal_that_was_edited_is_not_believed(store):
    path = store.folder / "block-00000.json"
    journal = json.loads(path.read_text())
    journal["rows"][0]["relative_loss"] = 0.0
    path.write_text(json.dumps(journal))
    assert reopened(store).finished == []


def test_what_was_being_written_is_removed(store):
    (store.folder / ".block-00003.safetensors.1.tmp").write_bytes(b"half")
    reopened(store)
    assert not any(path.name.startswith(".") for path in store.folder.iterdir())


def test_without_its_identity_nothing_is_used(store):
    cut(store.folder / "run.json")
    assert reopened(store).finished == []


def test_differences_are_named(store):
    other = ProgressStore(store.folder.parent, {**IDENTITY, "code": "2"})
    assert other.differences() == ["code 1 → 2"] and other.unfinished() == 3
    assert ProgressStore(store.folder.parent, IDENTITY).differences() == []


def test_measures_against_lack_of_memory_are_kept(store):
    store.keep_ladder({"passes": 2})
    assert reopened(store).ladder == {"passes": 2}


def test_weights_that_share_their_memory_are_written(tmp_path):
    store = ProgressStore(tmp_path, IDENTITY)
    store.open()
    whole = torch.arange(12.0).reshape(3, 4)
    expected = {"a": whole, "b": whole, "c": whole[1:], "d": whole.T}
    store.finish(0, expected, block(0))
    store.wait()
    from safetensors.torch import load_file

    read = load_file(store.shard(0))
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


def test_an_error_while_writing_is_told_with_the_next_block(tmp_path, monkeypatch):
    store = ProgressStore(tmp_path, IDENTITY)
    store.open()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alps_exp.pruning.store.save_file", full)
    store.finish(0, weights(0), block(0))
    with pytest.raises(OSError, match="No space left"):
        store.finish(1, weights(1), block(1))
    assert reopened(store).finished == []


def test_a_directory_serves_one_process(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
