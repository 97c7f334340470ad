"""What is kept of a block's forwards: fewer of them, and the same bits."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, network, tokens
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from alps_exp.allocation.prunable import linear_shapes
from alps_exp.allocation.selection import Selection
from alps_exp.base.errors import UserError
from alps_exp.baselines.wanda import Wanda
from alps_exp.calibration import replay
from alps_exp.layer.registry import solver
from alps_exp.methods.target import LayerTarget, StreamTarget, Target
from alps_exp.model.blocks import BlockModel
from alps_exp.patterns import parse_sparsity
from alps_exp.procedure.prune import prune_blocks
from alps_exp.pruning.job import PruneJob
from alps_exp.pruning.rows import PruneResult

TARGETS = pytest.mark.parametrize("target", [LayerTarget(), StreamTarget()], ids=["layer", "stream"])


def prune(model: nn.Module, target: Target, selection: Selection | None = None, **options) -> PruneResult:
    selection = selection or Selection()
    patterns = selection.patterns_for(linear_shapes(model, selection), parse_sparsity("0.5"))
    options = {"tokens": tokens(), "batch_size": 5, "quiet": True, "capture": "groups", **options}
    return prune_blocks(
        BlockModel(model, torch.device("cpu")), PruneJob(solver("wanda"), patterns, selection, target=target, **options)
    )


def told(result: PruneResult) -> list:
    return [(row.name, row.relative_loss, row.target_loss, row.held_out_loss) for row in result.layers] + [result.drift]


@pytest.mark.parametrize(
    ("family", "held_out", "target"),
    [
        ("llama", None, LayerTarget()),
        *(("llama", tokens(6), target) for target in (LayerTarget(), StreamTarget())),
        *((family, tokens(6), StreamTarget()) for family in CONFIGS if family != "llama"),
        ("gpt-neox", tokens(6), LayerTarget()),  # attention and feed-forward part side by side
    ],
    ids=["llama alone", "llama layer", *CONFIGS, "gpt-neox layer"],
)
def test_a_run_that_keeps_outputs_has_the_bits_of_one_that_does_not(family, target, held_out, monkeypatch):
    one, other = network(family), network(family)
    found = told(prune(one, target, held_out=held_out))
    monkeypatch.setattr(replay, "free_device", lambda device: 0)
    assert told(prune(other, target, held_out=held_out)) == found
    for (name, parameter), same in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, same), name


def test_windows_that_go_through_the_dense_model_do_so_whatever_is_kept(monkeypatch):
    """What is kept meanwhile is of the pruned block."""
    found = told(prune(network("llama"), LayerTarget(), propagate="dense", held_out=tokens(6)))
    monkeypatch.setattr(replay, "free_device", lambda device: 0)
    assert told(prune(network("llama"), LayerTarget(), propagate="dense", held_out=tokens(6))) == found


@pytest.mark.parametrize(("target", "spared"), [(LayerTarget(), 3), (StreamTarget(), 5)], ids=["layer", "stream"])
@pytest.mark.parametrize("held_out", [None, tokens(6)], ids=["alone", "held out"])
def test_attention_that_has_not_changed_is_not_run_again(target, spared, held_out, monkeypatch):
    """Of the pruned block for the last two captures and behind the block, also on held-out windows; of the dense one
    for the last capture and behind it."""
    calls, forward = [], LlamaAttention.forward
    monkeypatch.setattr(
        LlamaAttention, "forward", lambda self, *args, **keys: calls.append(self) or forward(self, *args, **keys)
    )
    counts = []
    for room in (True, False):
        if not room:
            monkeypatch.setattr(replay, "free_device", lambda device: 0)
        model = network("llama")
        prune(model, target, batch_size=12, held_out=held_out)
        counts.append(calls.count(model.model.layers[0].self_attn))
    assert counts[1] - counts[0] == spared + (3 if held_out is not None else 0)


@TARGETS
def test_outputs_that_are_written_over_are_not_kept(target, monkeypatch):
    def forward(self, hidden_states, **keys):
        hidden, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **keys)
        hidden += hidden_states
        behind = self.mlp(self.post_attention_layernorm(hidden))
        behind += hidden
        return behind

    expected = told(prune(network("llama"), target))
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    assert told(prune(network("llama"), target)) == expected


attention, memory = LlamaAttention.forward, {}


def _reused(name: str, value: torch.Tensor) -> torch.Tensor:
    held = memory.setdefault((name, value.shape), torch.empty_like(value))
    return held.copy_(value)


def _writes_over_its_output(self, *args, **keys):
    output, weights = attention(self, *args, **keys)
    output[:, :3] = 0
    return output, weights


def _writes_over_an_input(self, *args, **keys):
    def write(module: nn.Module, given: tuple, output: torch.Tensor) -> None:
        given[0].zero_()

    handle = self.o_proj.register_forward_hook(write)
    try:
        return attention(self, *args, **keys)
    finally:
        handle.remove()


def _takes_its_inputs_from_memory_that_it_uses_again(self, *args, **keys):
    linear = self.o_proj
    self.__dict__["o_proj"] = lambda value: linear(_reused("input", value))  # found before the module
    try:
        return attention(self, *args, **keys)
    finally:
        del self.__dict__["o_proj"]


def _gives_outputs_in_memory_that_it_uses_again(self, *args, **keys):
    output, weights = attention(self, *args, **keys)
    return _reused("output", output), weights


def _calls_its_last_layer_again(self, hidden_states, *args, **keys):
    found = attention(self, hidden_states, *args, **keys)
    self.o_proj(hidden_states)
    return found


def _returns_more(self, *args, **keys):
    return attention(self, *args, **keys)[0], "more"


@pytest.mark.parametrize(
    "forward",
    [
        _writes_over_its_output,
        _writes_over_an_input,
        _takes_its_inputs_from_memory_that_it_uses_again,
        _gives_outputs_in_memory_that_it_uses_again,
        _calls_its_last_layer_again,
        _returns_more,
    ],
)
@TARGETS
def test_attention_of_every_kind_gives_the_bits_that_it_gives_where_nothing_is_kept(forward, target, monkeypatch):
    if forward is _gives_outputs_in_memory_that_it_uses_again and isinstance(target, StreamTarget):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="target=layer"):
            patch.setattr(LlamaAttention, "forward", forward)
            prune(network("llama"), target)
        return
    monkeypatch.setattr(LlamaAttention, "forward", forward)
    found = told(prune(network("llama"), target, held_out=tokens(6)))
    monkeypatch.setattr(replay, "free_device", lambda device: 0)
    assert told(prune(network("llama"), target, held_out=tokens(6))) == found


@TARGETS
def test_an_excluded_part_behind_layers_that_are_still_open_is_run_again(target, monkeypatch):
    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32, bias=False)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.linear(hidden)

    def forward(self, hidden_states, **keys):
        hidden = self.input_layernorm(hidden_states)
        behind = hidden_states + self.self_attn(hidden_states=hidden, **keys)[0]
        return behind + self.middle(behind) + self.mlp(hidden)

    def made() -> nn.Module:
        model = network("llama")
        for block in model.model.layers:
            block.middle = Middle().to(next(model.parameters()).dtype)
            nn.init.orthogonal_(block.middle.linear.weight, generator=torch.Generator().manual_seed(0))
        return model

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    selection = Selection(exclude=("*middle*",))
    found = told(prune(made(), target, selection=selection))
    monkeypatch.setattr(replay, "free_device", lambda device: 0)
    assert told(prune(made(), target, selection=selection)) == found


def test_a_block_is_captured_at_once_where_a_writer_is_left_dense():
    """Its readers come behind the last writer that is fitted."""
    selection = Selection(exclude=("*down_proj",))
    result = prune(network("llama"), StreamTarget(), selection=selection, capture="block")
    assert {row.name.rpartition(".")[2] for row in result.layers} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
    }  # fmt: skip


def test_inference_mode_gives_the_same():
    expected = told(prune(network("llama"), LayerTarget()))
    with torch.inference_mode():
        assert told(prune(network("llama"), LayerTarget())) == expected


@pytest.mark.parametrize("where", ["behind", "solver"])
def test_what_is_kept_gives_way_before_the_measures_against_lack_of_memory(where, monkeypatch):
    expected = prune(network("llama"), StreamTarget())
    drops, drop = [], replay.Replay.drop
    monkeypatch.setattr(replay.Replay, "drop", lambda self: drops.append(drop(self)) or drops[-1])
    holder, name = (replay.Replay, "_left_out") if where == "behind" else (Wanda, "solve_group")
    whole = getattr(holder, name)

    def short(self, *args):
        called = args[1] if where == "behind" else None
        layer = "" if where == "behind" else args[0][0].name
        if not any(drops) and (called == () or "mlp" in layer):
            raise torch.OutOfMemoryError("out of memory (not really)")
        return whole(self, *args)

    monkeypatch.setattr(holder, name, short)
    result = prune(network("llama"), StreamTarget())
    assert any(drops) and not result.notes
    assert told(result) == told(expected)
