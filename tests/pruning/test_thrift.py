"""Runs on a device whose memory does not suffice (the errors are raised by hand) give the same to rounding."""

import pytest
import torch
from helpers import out_of_memory
from tiny import load, random_tokens

import alps_exp
from alps_exp.allocation.prunable import linear_shapes
from alps_exp.base import memory
from alps_exp.base.errors import UserError
from alps_exp.calibration.capture import Collector
from alps_exp.evaluation.perplexity import perplexity
from alps_exp.methods.alps import Alps
from alps_exp.model.blocks import BlockModel
from alps_exp.model.hidden import HiddenStates, choose_place
from alps_exp.procedure.prune import prune_blocks
from alps_exp.pruning import block
from alps_exp.pruning import store as progress_store
from alps_exp.pruning.job import PruneJob
from alps_exp.pruning.tools import Tools

CPU = torch.device("cpu")


def prune(folder, **options) -> tuple[dict, torch.nn.Module]:
    network = load(folder)
    return alps_exp.prune_model(network, random_tokens(6, 48), method="sparsegpt", sparsity="2:4", **options), network


def assert_close(one: dict, other: dict) -> None:
    for a, b in zip(one["layers"], other["layers"], strict=True):
        assert a["name"] == b["name"] and a["tokens"] == b["tokens"]
        assert a["relative_loss"] == pytest.approx(b["relative_loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 3])
def test_forwards_of_fewer_windows(tiny_llama, monkeypatch, limit):
    expected, network = prune(tiny_llama, batch_size=6)
    out_of_memory(monkeypatch, BlockModel, "forward_block", lambda self, i, block, hidden: len(hidden) > limit)
    record, thrifty = prune(tiny_llama, batch_size=6)
    assert_close(record, expected)
    assert record["warnings"] == [
        f"device memory ran short at model.layers.0; from there on: {size} windows at a time"
        for size in (3, 1)
        if size >= limit
    ]
    with torch.no_grad():
        one, other = network(random_tokens(6, 48)).logits, thrifty(random_tokens(6, 48)).logits
    assert float((one - other).norm() / one.norm()) < 1e-3


def test_embedding_and_perplexity_of_fewer_windows(tiny_opt, monkeypatch):
    expected = perplexity(BlockModel(load(tiny_opt), CPU), random_tokens(6, 48), 6, quiet=True)
    out_of_memory(monkeypatch, BlockModel, "embed", lambda self, chunk: len(chunk) > 3)
    out_of_memory(monkeypatch, BlockModel, "forward_block", lambda self, i, block, hidden: len(hidden) > 2)
    assert perplexity(BlockModel(load(tiny_opt), CPU), random_tokens(6, 48), 6, quiet=True) == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.slow
def test_statistics_in_several_passes(tiny_llama, monkeypatch):
    expected, _ = prune(tiny_llama)
    out_of_memory(monkeypatch, Collector, "begin", lambda self, hidden: len(self._layers) > 2)
    record, _ = prune(tiny_llama)
    assert_close(record, expected)
    assert [line.partition("on: ")[2] for line in record["warnings"]] == [
        "statistics in 2 passes",
        "statistics in 4 passes",
    ]


@pytest.mark.slow
def test_layers_one_by_one(tiny_llama, monkeypatch):
    network, expected = load(tiny_llama), None
    expected = alps_exp.prune_model(network, random_tokens(6, 48), sparsity=0.6)
    out_of_memory(monkeypatch, Alps, "solve_group", lambda self, problems, patterns: len(problems) > 1)
    record = alps_exp.prune_model(load(tiny_llama), random_tokens(6, 48), sparsity=0.6)
    assert_close(record, expected)
    assert [line.partition("on: ")[2] for line in record["warnings"]] == [
        "statistics in host memory until they are needed",
        "layers with the same input one by one",
    ]


@pytest.mark.parametrize(
    ("owner", "name"), [(BlockModel, "forward_block"), (BlockModel, "embed"), (Alps, "solve_group")]
)
def test_when_nothing_helps_it_says_what_to_do(tiny_llama, monkeypatch, owner, name):
    out_of_memory(monkeypatch, owner, name, lambda self, *_: True)
    with pytest.raises(UserError, match=r"(embedding|model\.layers\.0): the device's memory does not suffice.*seqlen"):
        alps_exp.prune_model(load(tiny_llama), random_tokens(6, 48), sparsity=0.6, batch_size=4)


def test_an_error_after_the_first_of_a_group_leaves_no_pruned_weight(tiny_llama, monkeypatch):
    """A group is tried again from its dense weights: nothing is written before all of it is solved."""
    original, seen = block.measured, []

    def failing(index, solved, *rest):
        seen.append(solved.layer.weight.count_nonzero() == solved.layer.weight.numel())
        if len(seen) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory (not really)")
        return original(index, solved, *rest)

    monkeypatch.setattr(block, "measured", failing)
    prune(tiny_llama)
    assert all(seen) and len(seen) == 14 + 2


def test_hidden_states_leave_the_device_first(tiny_llama, monkeypatch):
    model = BlockModel(load(tiny_llama), CPU, hidden_states="device")
    hidden = HiddenStates(model, random_tokens(6, 48), 4)
    before = torch.cat(list(hidden))
    assert hidden.relieve() == "hidden states in host memory" and hidden.place == "host"
    assert hidden.relieve() == "2 windows at a time" and hidden.sizes == [2, 2, 2]
    assert hidden.relieve(2) == "1 windows at a time" and hidden.sizes == [2, 1, 1, 1, 1]
    assert hidden.relieve(2) is None
    assert torch.equal(torch.cat(list(hidden)), before)


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_hidden_states_are_the_same_wherever_they_are(tiny_gemma3, tmp_path, place):
    model = BlockModel(load(tiny_gemma3), CPU, hidden_states=place, scratch=tmp_path)
    assert perplexity(model, random_tokens(6, 48), 4, quiet=True) == perplexity(
        BlockModel(load(tiny_gemma3), CPU), random_tokens(6, 48), 4, quiet=True
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free", "place"), [(10**9, "host"), (1000, "disk")])
def test_hidden_states_go_where_there_is_room(tiny_llama, tmp_path, monkeypatch, free, place):
    monkeypatch.setattr("alps_exp.model.hidden.free_host", lambda: free)
    assert HiddenStates(BlockModel(load(tiny_llama), CPU, scratch=tmp_path), random_tokens(6, 48), 2).place == place


@pytest.mark.parametrize(("sharers", "place"), [(2, "host"), (3, "disk")])
def test_processes_of_one_host_share_its_memory(tiny_llama, tmp_path, monkeypatch, sharers, place):
    model = BlockModel(load(tiny_llama), CPU, scratch=tmp_path)
    size = HiddenStates(model, random_tokens(6, 48), 2).nbytes
    monkeypatch.setattr("alps_exp.model.hidden.free_host", lambda: 4 * size)
    assert HiddenStates(model, random_tokens(6, 48), 2, sharers=sharers).place == place


@pytest.mark.parametrize(("room", "place"), [(None, "device"), (100, "device"), (99, "host")])
def test_the_device_may_be_kept_for_what_comes_after_them(monkeypatch, room, place):
    monkeypatch.setattr("alps_exp.model.hidden.free_device", lambda device: 400)
    assert choose_place(torch.device("cuda"), 100, room) == place


@pytest.mark.slow
def test_a_resumed_run_keeps_to_what_was_done(tiny_llama, tmp_path, monkeypatch):
    """Memory is short in the first attempt only; the second goes on in the same small steps, bit by bit the same."""

    def attempt(folder, fail: bool):
        store = progress_store.ProgressStore(folder, {"same": "yes"})
        store.open()
        from alps_exp.allocation.selection import Selection
        from alps_exp.layer.registry import solver
        from alps_exp.patterns import parse_sparsity

        network = load(tiny_llama)
        patterns = Selection().patterns_for(linear_shapes(network, Selection()), parse_sparsity(0.5))
        job = PruneJob(solver("sparsegpt"), patterns, Selection(), random_tokens(6, 48), batch_size=6, quiet=True)
        with monkeypatch.context() as patch:
            if fail:
                out_of_memory(patch, BlockModel, "forward_block", lambda self, i, block, hidden: len(hidden) > 2)
                out_of_memory(patch, BlockModel, "name", lambda self, i: False)
            return prune_blocks(BlockModel(network, CPU), job, Tools(store)), network

    whole, expected = attempt(tmp_path / "whole", fail=True)
    attempt(tmp_path / "run", fail=True)
    for file in (tmp_path / "run" / ".progress").glob("block-00001.*"):
        file.unlink()
    result, network = attempt(tmp_path / "run", fail=False)
    assert result.notes == whole.notes and len(result.notes) == 2
    assert [row.relative_loss for row in result.layers] == [row.relative_loss for row in whole.layers]
    one, other = network.state_dict(), expected.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_held_out_windows_share_the_ladder_and_a_resumed_run_keeps_to_it(tiny_llama, tmp_path, monkeypatch):
    """Memory is too short for more than one held-out window, whose batches are told from others by their number."""
    from alps_exp.allocation.selection import Selection
    from alps_exp.layer.registry import solver
    from alps_exp.patterns import parse_sparsity

    held_out = random_tokens(5, 48)

    def attempt(folder, limit: int):
        store = progress_store.ProgressStore(folder, {"same": "yes"})
        store.open()
        network, sizes = load(tiny_llama), []
        patterns = Selection().patterns_for(linear_shapes(network, Selection()), parse_sparsity(0.5))
        options = {"batch_size": 6, "held_out": held_out, "quiet": True}
        job = PruneJob(solver("sparsegpt"), patterns, Selection(), random_tokens(4, 48), **options)
        original = HiddenStates.advance

        def advance(self, model, index, block, **options):
            original(self, model, index, block, **options)
            sizes.append((len(self._tokens), tuple(self.sizes)))

        with monkeypatch.context() as patch:
            patch.setattr(HiddenStates, "advance", advance)
            out_of_memory(patch, BlockModel, "forward_block", lambda self, i, block, hidden: len(hidden) > limit)
            return prune_blocks(BlockModel(network, CPU), job, Tools(store)), sizes

    dense, _ = attempt(tmp_path / "enough", 6)
    whole, sizes = attempt(tmp_path / "whole", 1)
    assert sizes == [(4, (1,) * 4), (5, (1,) * 5)]
    assert [line.partition("on: ")[2] for line in whole.notes] == ["2 windows at a time", "1 windows at a time"]
    for one, other in zip(dense.layers, whole.layers, strict=True):
        assert one.held_out_loss == pytest.approx(other.held_out_loss, rel=1e-3)
    for file in (tmp_path / "whole" / ".progress").glob("block-00001.*"):
        file.unlink()
    result, sizes = attempt(tmp_path / "whole", 6)
    assert sizes == [(4, (1,) * 4), (5, (1,) * 5)] and result.notes == whole.notes
    assert [row.held_out_loss for row in result.layers] == [row.held_out_loss for row in whole.layers]


def test_held_out_windows_give_way_when_only_they_do_not_fit(tiny_llama, monkeypatch):
    from alps_exp.allocation.selection import Selection
    from alps_exp.layer.registry import solver
    from alps_exp.patterns import parse_sparsity

    network = load(tiny_llama)
    patterns = Selection().patterns_for(linear_shapes(network, Selection()), parse_sparsity(0.5))
    options = {"batch_size": 4, "held_out": random_tokens(4, 48), "quiet": True}
    job = PruneJob(solver("sparsegpt"), patterns, Selection(), random_tokens(1, 48), **options)
    out_of_memory(monkeypatch, BlockModel, "forward_block", lambda self, i, block, hidden: len(hidden) > 2)
    result = prune_blocks(BlockModel(network, CPU), job)
    assert [line.partition("on: ")[2] for line in result.notes] == ["2 windows at a time"]
    assert all(row.held_out_loss is not None for row in result.layers)


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "3000", "memory.current": "2500", "memory.stat": "anon 9\ninactive_file 400"}, [900]),
        ({"memory.max": "max", "memory.current": "2500", "memory.stat": "inactive_file 400"}, []),
        ({}, []),
    ],
)
def test_a_containers_limit_counts(tmp_path, monkeypatch, files, left):
    for name, content in files.items():
        (tmp_path / name).write_text(content + "\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory._left_in_group() == left
    assert memory.free_host() <= min([*left, 10**15])
