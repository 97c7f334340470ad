"""Replayed passes against those that run as they are, and what becomes of those that cannot be recorded.

On a CPU a stand-in takes the place of the graphs, which makes each pass anew; on a GPU the graphs themselves run.
"""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from tiny import network, tokens
from torch import Tensor, nn

from alps_exp import prune_model
from alps_exp.model.structure import find_blocks
from alps_exp.training import replayed
from alps_exp.training import trainer as training
from alps_exp.training.finish import BlockFinish, Distillation, Finish
from alps_exp.training.recipe import Recipe
from alps_exp.training.replayed import Replayed

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need CUDA")
CHOICES = {"block": Finish(block=BlockFinish(epochs=3)), "distil": Finish(distil=Distillation(epochs=3))}
NOT = "training: steps are not replayed as CUDA graphs: "


class Anew:
    """What `Graphs` does, by making each pass when it is asked for."""

    fault = ""

    def __init__(self, passing, hidden, masters) -> None:
        self.passing, self.masters = passing, masters
        if self.fault == "memory":
            raise torch.OutOfMemoryError("too much\nfor this device")
        passing(hidden.detach()).sum().backward()
        self.made = [(value, value.grad) for value in masters.values.values() if value.grad is not None]
        if self.fault == "gradient":
            self.made.pop()
        masters.forget()

    def forward(self, hidden: Tensor) -> Tensor:
        if self.fault == "later" and Stand.last.passes > 1 and not Stand.last._proving:
            raise torch.OutOfMemoryError
        self.given = hidden.detach().requires_grad_(hidden.requires_grad)
        with torch.enable_grad():
            self.out = self.passing(self.given)
        return self.out.detach() * (1.01 if self.fault == "output" else 1)

    def backward(self, gradient: Tensor) -> Tensor | None:
        values = list(self.masters.values.values())
        before = [value.grad for value in values]
        self.masters.forget()
        self.out.backward(gradient)
        for value, own in self.made:
            own.copy_(value.grad)
        for value, gone in zip(values, before, strict=True):
            value.grad = gone
        return self.given.grad

    def write(self) -> None:
        if self.fault != "write":
            self.masters.write()


class Stand(Replayed):
    """Replays on any device."""

    last: Stand

    def __init__(self, blocks, *rest) -> None:
        super().__init__(blocks, *rest)
        self.on, Stand.last = bool(blocks), self


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, hidden: Tensor, shift: Tensor) -> Tensor:
        return hidden + torch.tanh(self.inner(hidden) + shift)


class Model(nn.Module):
    """Blocks between layers that are trained with them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 1)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, numbers, shift=0.5, between=lambda hidden: hidden) -> Tensor:
        hidden = self.first(torch.randn(20, 3, 6, generator=torch.Generator().manual_seed(1))[list(numbers)])
        for block in self.blocks:
            hidden = block(between(hidden), torch.as_tensor(shift))
        return self.last(hidden)


def model_trained(
    monkeypatch, fault=None, call=lambda model, numbers: model(numbers), prepare=lambda model: None, **more
):
    """Weights in the end and what was done; `fault` of the recording, None: there is none."""
    torch.manual_seed(0)
    model = Model()
    model.blocks[0].inner.weight.data[model.blocks[0].inner.weight.abs() < 0.1] = 0
    prepare(model)
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
    trained = {name: model.get_parameter(name) != 0 if "0.inner" in name else None for name in names}
    recipe = {"rate": 0.01, "steps": 15, "batch": 4, "judged": 3, "clip": 1.0} | more.pop("recipe", {})

    def loss(numbers, held_out: bool) -> Tensor:
        return (call(model, [number + 16 * held_out for number in numbers]) - 1).square().mean()

    with monkeypatch.context() as patch:
        if fault is not None:
            patch.setattr(replayed, "Graphs", type("Faulty", (Anew,), {"fault": fault}))
            patch.setattr(replayed, "_waiting", lambda: nullcontext([]))
            patch.setattr(training, "Replayed", Stand)
        made = training.Trainer(
            model, trained, loss, more.pop("windows", 10), Recipe(**recipe), held_out=3, quiet=True,
            blocks=list(model.blocks), **more,
        )  # fmt: skip
        done = made.run()
    assert not any("forward" in vars(block) for block in model.blocks)
    return model.state_dict(), done


def assert_same(one: tuple, other: tuple) -> None:
    assert [name for name, weight in one[0].items() if not torch.equal(weight, other[0][name])] == []
    curves = [done["curve"] if isinstance(done, dict) else done.curve for _, done in (one, other)]
    told = [[{**row, "seconds": None} for row in curve] for curve in curves]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("options", "passes"),
    # Of three steps an epoch the last is of two windows, and the first two steps run as they are.
    [
        ({}, 8),
        ({"windows": 8}, 13),
        ({"windows": 3}, 13),
        ({"recipe": {"micro": 2}}, 23),
        ({"recipe": {"micro": 3}}, 8),
    ],
    ids=["smaller last batch", "even", "few windows", "two passes a step", "passes of two sizes"],
)
def test_replayed_steps_are_those_that_run_as_they_are(monkeypatch, options, passes):
    plain, ours = model_trained(monkeypatch, **options), model_trained(monkeypatch, "", **options)
    assert_same(plain, ours)
    assert (plain[1].replayed, ours[1].replayed, ours[1].notes) == (0, passes, [])


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("memory", "OutOfMemoryError: too much"),
        ("gradient", "a replayed step's loss differs by 0 of itself from that of the same step as it runs, and a grad"),
        ("output", "a replayed step's loss differs by "),
        ("write", "weights that a replay has written are not those of the masters"),
    ],
)
def test_a_recording_that_fails_or_does_something_else_is_dropped(monkeypatch, fault, why):
    ours = model_trained(monkeypatch, fault)
    assert_same(model_trained(monkeypatch), ours)
    assert ours[1].replayed == 0 and len(ours[1].notes) == 1 and ours[1].notes[0].startswith(NOT + why)


def _hooked(model: Model) -> None:
    model.blocks[1].inner.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"prepare": _hooked}, "a module has hooks, which would run once"),
        ({"call": lambda model, numbers: model(numbers, between=torch.sin)}, "blocks are not called one after the oth"),
        ({"call": lambda model, numbers: model(numbers, shift=numbers[0] / 5)}, "a replayed step's loss differs by"),
    ],
    ids=["hooks", "something in between", "arguments that differ"],
)  # fmt: skip
def test_blocks_that_cannot_be_replayed_run_as_they_are(monkeypatch, options, why):
    ours = model_trained(monkeypatch, "", **options)
    assert_same(model_trained(monkeypatch, **options), ours)
    assert ours[1].replayed == 0 and len(ours[1].notes) == 1 and ours[1].notes[0].startswith(NOT + why)


def test_without_memory_for_a_replay_steps_run_as_they_are(monkeypatch):
    options = {"windows": 8, "recipe": {"micro": 2}}
    ours = model_trained(monkeypatch, "later", **options)
    assert_same(model_trained(monkeypatch, **options), ours)
    why = "device memory ran short in training; from there on: steps are not replayed as CUDA graphs"
    assert ours[1].notes == [why] and ours[1].micro == 2


def test_weights_that_move_are_not_those_that_were_recorded(monkeypatch):
    def moving(model: Model, numbers) -> Tensor:
        bias = model.blocks[1].inner.bias
        if Stand.last.passes == 0 and Stand.last._graphs is not None and not Stand.last._proving:
            bias.data = bias.data.clone()
        return model(numbers)

    ours = model_trained(monkeypatch, "", call=moving)
    assert_same(model_trained(monkeypatch), ours)
    assert ours[1].notes == [NOT + "weights have moved"]


def test_a_training_that_goes_on_records_anew_and_ends_the_same(monkeypatch, tmp_path):
    whole, file = model_trained(monkeypatch, ""), tmp_path / "checkpoint.pt"
    monkeypatch.setattr(training, "_WORTH", 0)
    calls = []

    def killed(model: Model, numbers) -> Tensor:
        calls.append(numbers)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return model(numbers)

    with pytest.raises(KeyboardInterrupt):
        model_trained(monkeypatch, "", call=killed, file=file, recipe={"saved": 2})
    again = model_trained(monkeypatch, "", file=file, recipe={"saved": 2})
    assert_same(whole, again)
    assert 0 < again[1].replayed < whole[1].replayed and again[1].steps == 15


def trained(family: str, stage: str, monkeypatch, recorded: bool = True, windows: int = 12, change=lambda model: None):
    """The weights, and what the training, or that of the last block, did, with attention that repeats its bits."""
    with monkeypatch.context() as patch:
        if not recorded:
            patch.setattr(replayed, "_SMALL", 0)
        model = network(family).float().to("cuda" if torch.cuda.is_available() else "cpu")
        model.set_attn_implementation("eager")
        change(model)
        options = {"batch_size": 5, "held_out": tokens(15)[12:], "finish": CHOICES[stage]}
        finish = prune_model(model, tokens(windows), "magnitude", "0.5", **options)["finish"]
    assert not any("forward" in vars(block) for block in find_blocks(model)[1])
    done = finish.get("distil") or finish["blocks"][-1]
    return {name: weight.cpu() for name, weight in model.state_dict().items()}, done


@on_gpu
@pytest.mark.parametrize("windows", [12, 10], ids=["even", "smaller last batch"])
@pytest.mark.parametrize("stage", list(CHOICES))
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "gpt-neox"])
def test_graphs_do_what_steps_do_as_they_are_to_the_bit(family, stage, windows, monkeypatch):
    plain = trained(family, stage, monkeypatch, recorded=False, windows=windows)
    ours = trained(family, stage, monkeypatch, windows=windows)
    assert_same(plain, ours)
    assert plain[1]["replayed"] == 0 and plain[1]["notes"] == ours[1]["notes"] == []
    assert ours[1]["replayed"] == (7 if windows == 12 else 4)


class _Waits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * (1 if bool(gradient.isfinite().all()) else 0)


def _waiting(model: nn.Module, where: str) -> None:
    mlp = find_blocks(model)[1][1].mlp
    inner = mlp.forward

    def forward(hidden: Tensor) -> Tensor:
        if where == "forward" and not bool(hidden.isfinite().all()):
            raise ValueError
        return inner(_Waits.apply(hidden) if where == "backward" else hidden)

    mlp.forward = forward


@on_gpu
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_block_that_waits_for_the_device_is_not_recorded(where, monkeypatch):
    """In the backward pass that is found out while it is recorded."""
    plain, ours = (
        trained("llama", "distil", monkeypatch, recorded=recorded, change=lambda model: _waiting(model, where))
        for recorded in (False, True)
    )
    assert_same(plain, ours)
    assert ours[1]["replayed"] == 0 and len(ours[1]["notes"]) == 1
    assert ours[1]["notes"][0].startswith("distilling: steps are not replayed as CUDA graphs: ")


def test_on_a_cpu_nothing_is_recorded(monkeypatch):
    _, done = model_trained(monkeypatch, recipe={"steps": 2})
    assert (done.steps, done.replayed, done.notes) == (2, 0, [])


def test_a_trainer_goes_when_nobody_holds_it(monkeypatch):
    """Not when Python next looks for rings: masters and moments are as large as the model."""
    made = []
    before = training.Trainer.run
    monkeypatch.setattr(training.Trainer, "run", lambda self: made.append(weakref.ref(self)) or before(self))
    gc.collect()
    gc.disable()
    try:
        model_trained(monkeypatch, "", windows=8, recipe={"steps": 4})
        assert made[0]() is None
    finally:
        gc.enable()
