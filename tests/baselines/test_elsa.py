"""ELSA: against a plain loop in float64, exact counts, interrupted runs, refusals, and whether it is any good."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from helpers import Served
from tiny import FEW_WINDOWS, execute, load, network, tokens, weights, words_for

from alps_exp import UserError, prune_model
from alps_exp.baselines import elsa
from alps_exp.baselines.elsa import Elsa
from alps_exp.cli.overrides import compose
from alps_exp.cli.plan import plan
from alps_exp.layer import registry
from alps_exp.model.structure import block_layers, find_blocks
from alps_exp.patterns import parse_sparsity
from alps_exp.runs import together
from alps_exp.runs.settings import resolve
from alps_exp.runs.workspace import Workspace
from alps_exp.training import optimisers
from alps_exp.training import trainer as training_trainer
from alps_exp.training.trainer import Trainer

SHORT = Elsa(steps=10, batch=4, tokens=12 * 24, interval=3, rate=2e-3, penalty=0.3)


def prune(model, method: Elsa, sparsity="0.5", **options) -> dict:
    return prune_model(model, tokens(), method, sparsity, **options)


def pruned_weights(model) -> list[str]:
    prefix, blocks = find_blocks(model)
    found = [block_layers(block, f"{prefix}.{index}") for index, block in enumerate(blocks)]
    return [layer.stored for layers in found for layer in layers.values()]


def largest(score: torch.Tensor, sparsity: str) -> torch.Tensor:
    """Mask of the entries that stay, by sorting."""
    if ":" in sparsity:
        kept, width = map(int, sparsity.split(":"))
        groups = score.view(-1, width)
        order = groups.argsort(dim=1, descending=True, stable=True)[:, :kept]
        return torch.zeros_like(groups, dtype=torch.bool).scatter(1, order, True).view(score.shape)
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[score.flatten().argsort(descending=True, stable=True)[: round((1 - float(sparsity)) * len(mask))]] = True
    return mask.view(score.shape)


def plain_elsa(model, method: Elsa, sparsity: str) -> None:
    """The method by its formulas, with an Adam of its own."""
    ids, (one, two) = tokens(), (0.9, 0.95)
    names = pruned_weights(model)
    trained = dict(model.named_parameters()) if method.others else {name: model.get_parameter(name) for name in names}
    first = {name: torch.zeros_like(p) for name, p in trained.items()}
    second = {name: torch.zeros_like(p) for name, p in trained.items()}
    z = {name: trained[name].detach() * largest(trained[name].detach().abs(), sparsity) for name in names}
    u = {name: torch.zeros_like(z[name]) for name in z}

    def shares(step: int) -> float:
        t, s = step / method.steps, method.penalty_start
        return {
            "constant": 1.0,
            "linear": s + (1 - s) * t,
            "cosine": s + (1 - s) * (1 - math.cos(math.pi * t)) / 2,
            "exponential": s * (1 / s) ** t,
        }[method.penalty_schedule]

    def project(name: str, reached: torch.Tensor) -> torch.Tensor:
        weighing = second[name] if method.projection == "momentum" else 1.0
        return reached * largest(weighing * reached.square(), sparsity)

    order = Trainer(torch.nn.Linear(1, 1), {"weight": None}, None, len(ids), method.recipe())
    penalty = method.penalty * shares(0)
    for step in range(method.steps):
        rows = ids[order.batch(step)]
        log_p = model(rows).logits[:, :-1].log_softmax(-1)
        loss = -log_p.gather(-1, rows[:, 1:, None]).mean()
        gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        for name, p in trained.items():
            g = gradients[name] * min(1.0, method.clip / (norm + 1e-6))  # as torch clips
            g = g + penalty * (p.detach() - z[name] + u[name]) if name in z else g
            first[name] = one * first[name] + (1 - one) * g
            second[name] = two * second[name] + (1 - two) * g.square()
            m, v = first[name] / (1 - one ** (step + 1)), second[name] / (1 - two ** (step + 1))
            p.data -= method.rate * (1 - step / method.steps) * m / (v.sqrt() + 1e-8)
        if step % method.interval == 0:
            new = method.penalty * shares(step)
            for name in z:
                x = trained[name].detach().clone()
                z[name] = project(name, x + u[name])
                u[name] = (u[name] + x - z[name]) * penalty / new
            penalty = new
    for name in z:
        trained[name].data = project(name, trained[name].detach())


CASES = {
    "momentum": ({}, "llama", "0.5"),
    "magnitude": ({"projection": "magnitude"}, "llama", "0.8"),
    "linear": ({"penalty_schedule": "linear"}, "opt", "0.5"),
    "cosine": ({"penalty_schedule": "cosine", "interval": 1}, "llama", "0.7"),
    "exponential": ({"penalty_schedule": "exponential", "penalty_start": 0.01}, "gemma3", "2:4"),
    "pruned layers alone": ({"others": False}, "llama", "4:8"),
    "accumulated": ({"micro": 1}, "llama", "0.5"),
}


@pytest.mark.parametrize(("changes", "family", "sparsity"), CASES.values(), ids=list(CASES))
def test_every_step_is_as_by_a_plain_loop(changes, family, sparsity):
    method = dataclasses.replace(SHORT, **changes)
    ours, plain, dense = network(family), network(family), network(family)
    names = pruned_weights(dense)
    record = prune(ours, method, sparsity)
    plain_elsa(plain, method, sparsity)
    assert sorted(f"{row['name']}.weight" for row in record["layers"]) == sorted(names)
    for name, p in plain.named_parameters():
        found = ours.get_parameter(name)
        assert torch.equal(found == 0, p == 0) or name not in names, name
        torch.testing.assert_close(found, p, rtol=1e-8, atol=1e-11)
        changed = not torch.equal(found, dense.get_parameter(name))
        assert changed == (method.others or name in names), name
    training = record["training"]
    assert (training["steps"], training["tokens"], training["distinct_tokens"]) == (10, 40 * 24, 12 * 24)


@pytest.mark.parametrize(
    ("dtype", "sparsity"),
    [
        *((torch.float32, sparsity) for sparsity in ("0.3", "4:8")),
        *((torch.bfloat16, sparsity) for sparsity in ("0.9", "2:4")),
        *((torch.float16, sparsity) for sparsity in ("0.3", "1:4")),
    ],
    ids=str,
)
def test_counts_are_exact(dtype, sparsity):
    model = network("llama").to(dtype)
    record = prune(model, dataclasses.replace(SHORT, rate=1e-4), sparsity, held_out=tokens(15)[12:])
    for row in record["layers"]:
        weight = model.get_submodule(row["name"]).weight
        assert weight.dtype is dtype
        if ":" in sparsity:
            kept, width = map(int, sparsity.split(":"))
            assert (weight.view(-1, width).ne(0).sum(1) == kept).all()
        else:
            assert row["stats"]["kept"] == int(weight.count_nonzero()) == round((1 - float(sparsity)) * weight.numel())
        assert 0 < row["stats"]["distance"] < 1 and row["iterations"] == 10
        assert row["selection"] == (f"group of {sparsity[2:]}" if ":" in sparsity else "layer")
    assert record["training"]["before"] > 0 and record["training"]["after"] > 0
    assert record["finish"] == {} and record["summary"]["mean_relative_loss"] is None


def test_patterns_run_along_the_inputs_of_weights_that_are_stored_turned(tiny_gpt2):
    model = load(tiny_gpt2)
    record = prune(model, dataclasses.replace(SHORT, rate=1e-3), "2:4")
    for row in record["layers"]:
        weight = model.get_submodule(row["name"]).weight.T
        assert list(weight.shape) == row["shape"] and (weight.reshape(-1, 4).ne(0).sum(1) == 2).all()


def test_elsa_l_keeps_z_in_8_bits_and_u_in_16():
    found, method = {}, dataclasses.replace(SHORT, point="float8", dual="bfloat16")

    class Seen(elsa.Splitting):
        def end(self, trainer):
            found.update({name: (self._points[name], self._duals[name], self.point(name)) for name in self._parts})
            return super().end(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elsa, "Splitting", Seen)
        ours, other = network("llama").float(), network("llama").float()
        record = prune(ours, method, "0.8")
    prune(other, SHORT, "0.8")
    assert record["summary"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    for (values, scale), dual, point in found.values():
        assert (values.dtype, dual.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.bfloat16, torch.float32)
        assert values.float().abs().max() == 448 and point.abs().max() == pytest.approx(448 * float(scale))
    gaps = [(ours.get_parameter(n) - other.get_parameter(n)).norm() / other.get_parameter(n).norm() for n in found]
    assert 0 < max(gaps) < 0.3  # near ELSA, and not the same


def test_a_point_in_8_bits_is_within_its_rounding():
    splitting = elsa.Splitting(dataclasses.replace(SHORT, point="float8"), {"w": []})
    z = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).double() * 1e-3
    splitting._keep("w", z, torch.zeros_like(z))
    largest_step = 448 * float(splitting._points["w"][1]) * 2**-9  # of what is below the normal numbers
    assert ((splitting.point("w") - z).abs() <= z.abs() * 2**-4 + largest_step).all()
    splitting._keep("w", torch.zeros_like(z), z)
    assert (splitting.point("w") == 0).all()


def test_8_bit_moments_of_torchao():
    pytest.importorskip("torchao.optim")
    method = dataclasses.replace(registry.solver("elsa-l"), steps=4, batch=4, tokens=12 * 24, interval=2)
    record = prune(network("llama").float(), method, "0.5")
    assert record["summary"]["sparsity"] == 0.5 and record["training"]["curve"][-1]["rate"] < method.rate


def test_second_moments_are_given_in_numbers():
    weight = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.AdamW([weight], betas=(0.9, 0.95))
    weight.grad = torch.tensor([1.0, 2.0, 0.0])
    adam.step()
    torch.testing.assert_close(optimisers.second_moment(adam, weight), 0.05 * torch.tensor([1.0, 4.0, 0.0]))
    adam.state[weight] = {"state2": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(UserError, match=r"install torchao, or give method\.projection=magnitude"):
        optimisers.second_moment(adam, weight)


# Runs of the command line.


@pytest.fixture
def words(tiny_llama, text_file) -> list[str]:
    found = words_for(tiny_llama, text_file, *FEW_WINDOWS, "sparsity=0.8", "save=true")
    return [*found, "method=elsa", "method.steps=60", "method.batch=4", "method.rate=0.004", "method.interval=4"]


@pytest.mark.slow
def test_a_trained_model_beats_magnitude_at_80_percent(words, tmp_path, text_file):
    record = execute(words, tmp_path / "elsa", "data.holdout=4")
    plain = execute([word for word in words if not word.startswith("method")], tmp_path / "plain", "method=magnitude")
    assert record["evaluations"][0]["value"] < 0.7 * plain["evaluations"][0]["value"]
    training = record["training"]
    assert training["tokens"] == training["distinct_tokens"] == 60 * 4 * 64
    assert training["tokens_per_second"] == pytest.approx(training["tokens"] / training["seconds"])
    assert record["calibration"]["training_windows"] == 60 * 4 - 8
    assert record["phases"]["train_seconds"] == training["seconds"]
    saved = load(tmp_path / "elsa" / "model")
    for row in record["layers"]:
        weight = saved.get_submodule(row["name"]).weight
        assert int(weight.count_nonzero()) == round(0.2 * weight.numel())


SHORTER = ["method.steps=9", "method.tokens=1024", "method.saved=2", "method.penalty_schedule=linear", "eval=none"]


@pytest.fixture(scope="module")
def whole(tiny_llama, text_file, tmp_path_factory):
    """The weights of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    execute([*words.__wrapped__(tiny_llama, text_file), *SHORTER], folder)
    return weights(folder)


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 5, 9])  # before the first checkpoint, after one, behind the last step
def test_a_killed_run_goes_on_to_the_same_bits(words, whole, tmp_path, monkeypatch, at):
    inner, end = Trainer._step, elsa.Splitting.end

    def step(self, number):
        if number == at:
            raise Killed
        inner(self, number)

    def ended(self, trainer):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        patch.setattr(training_trainer, "_WORTH", 0)
        patch.setattr(elsa.Splitting, "end", ended if at == 9 else end)
        with pytest.raises(Killed):
            execute([*words, *SHORTER], tmp_path)
    steps = []
    monkeypatch.setattr(Trainer, "_step", lambda self, number: (steps.append(number), inner(self, number)))
    record = execute([*words, *SHORTER], tmp_path)
    found = weights(tmp_path)
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    assert record["attempts"] == 2 and steps == list(range(at, 9)), "a look, with its checkpoint, follows every step"
    assert not (tmp_path / ".progress").exists()


@pytest.mark.slow
def test_two_processes_train_as_one(words, whole, tmp_path, monkeypatch):
    """The one that has started them makes no masters: it takes over what they have left."""
    monkeypatch.setattr(together, "_start", Served)
    made, inner = [], Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: (made.append(dict(self.masters.values)), inner(self))[1])
    record = execute([*words, *SHORTER, "devices=2"], tmp_path)
    assert made == [{}]
    assert [row["stats"]["kept"] for row in record["layers"]] == [
        round((1 - row["sparsity"]) * math.prod(row["shape"])) for row in record["layers"]
    ]
    found = weights(tmp_path)
    for name, weight in found.items():
        apart = (weight - whole[name]).abs() > 1e-5 * whole[name].abs().max()
        assert apart.double().mean() < 1e-3, name  # what is nearly a tie may be kept or not
    assert (record["training"]["steps"], record["training"]["windows"]) == (9, 36)
    assert record["phases"]["train_seconds"] == record["training"]["seconds"]
    assert not (tmp_path / ".progress").exists()


@pytest.mark.slow
def test_the_next_run_of_a_sweep_begins_with_the_dense_model(words, tmp_path):
    workspace = Workspace(keep=True)
    more = [*SHORTER, "save=false"]
    execute([*words, *more], tmp_path / "first", workspace=workspace)
    dense = ["method=dense", *[word for word in words if not word.startswith("method")]]
    kept = execute(dense, tmp_path / "dense", workspace=workspace)
    fresh = execute(dense, tmp_path / "fresh")
    assert kept["evaluations"][0]["value"] == fresh["evaluations"][0]["value"]


@pytest.mark.slow
def test_memory_that_ran_short_does_not_cost_the_progress(words, whole, tmp_path, monkeypatch):
    inner, gradients = Trainer._step, Trainer._gradients

    def step(self, number):
        if number == 5:
            raise Killed
        inner(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_gradients", lambda self, *more: gradients(self, *more) if self.micro < 4 else None)
        patch.setattr(Trainer, "_step", step)
        patch.setattr(training_trainer, "_WORTH", 0)
        with pytest.raises(Killed):
            execute([*words, *SHORTER], tmp_path)
    steps = []
    monkeypatch.setattr(Trainer, "_step", lambda self, number: (steps.append(number), inner(self, number)))
    record = execute([*words, *SHORTER], tmp_path)
    assert steps == [5, 6, 7, 8] and record["training"]["micro"] == 2
    assert any("2 windows per backward pass" in line for line in record["warnings"])


REFUSED = {
    "rate": ("method.rate=0", "method.rate=0.* is not allowed: give a number above 0"),
    "interval": ("method.interval=0", "method.interval=0 is not allowed: give a whole number from 1"),
    "penalty": ("method.penalty=0", "method.penalty=0.* is not allowed"),
    "start": ("method.penalty_start=0", "method.penalty_start=0.* is not allowed"),
    "steps": ("method.steps=0", "method.steps=0 is not allowed"),
    "batch": ("method.batch=0", "method.batch=0 is not allowed"),
    "micro": ("method.micro=5", "method.micro=5 is not allowed: give a whole number from 1 up to 4"),
    "no micro": ("method.micro=0", "method.micro=0 is not allowed: give a whole number from 1 up to 4"),
    "tokens": ("method.tokens=0", "method.tokens=0 is not allowed"),
    "tokens of more steps": ("method.tokens=90000", r"more than the 15360 that 60 steps of 4 .*give method.steps=352"),
    "projection": ("method.projection=momentun", "method.projection='momentun' is not allowed"),
    "schedule": ("method.penalty_schedule=exp", "method.penalty_schedule='exp' is not allowed"),
    "point": ("method.point=float4", "method.point='float4' is not allowed"),
    "devices": ("devices=5", "method.batch=4 windows are fewer than devices=5: give a larger batch, or fewer devices"),
    "stream": ("stream=true", "elsa trains all blocks at once and needs the model in memory"),
    "finish": ("finish=distil data.holdout=2", "finish=distil compares with the dense model, and elsa trains"),
    "refit": ("refit=pcg", "refit=pcg fits the weights of layers .* and Elsa prunes"),
    "target": ("target=stream", "target=stream goes with methods that prune layer by layer, and elsa"),
    "N:M": ("sparsity=2:7", "2:7"),
}


@pytest.mark.parametrize(("more", "message"), REFUSED.values(), ids=list(REFUSED))
def test_mistakes_are_refused_before_anything_runs(words, more, message):
    with pytest.raises(UserError, match=message) as error:
        resolve(compose([*words, *more.split()]))
    assert "\n" not in str(error.value)


def test_8_bits_need_a_library(words, monkeypatch):
    monkeypatch.setattr(optimisers, "_EIGHT_BIT", ("nowhere.optim",))
    with pytest.raises(UserError, match=r"state=8bit needs torchao or bitsandbytes.*or give state=float32"):
        resolve(compose([*words, "method.state=8bit"]))


@pytest.mark.slow
def test_too_little_text_is_refused_before_training(words, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "run", None)
    short = "the training text has only .* windows of seqlen=64 tokens, 3992 were asked; lower method.tokens"
    with pytest.raises(UserError, match=short):
        execute(words, tmp_path, "method.steps=1000")
    with pytest.raises(
        UserError, match=r"ELSA trains on 16 windows of 24 tokens, and there are 12: .*method.tokens=288"
    ):
        prune(network("llama"), dataclasses.replace(SHORT, tokens=None, steps=4))


def test_too_little_memory_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(Trainer, "run", None)
    monkeypatch.setattr("alps_exp.procedure.trained.free_host", lambda: 1000)
    with pytest.raises(UserError, match=r"ELSA needs at least .* GB of memory for this model, and cpu has"):
        prune(network("llama"), SHORT)


def test_a_plan_tells_tokens_time_and_memory(words):
    text = plan(resolve(compose([*words, "plan=true", "method.tokens=4096"])))
    assert "training on 15,360 tokens (4,096 of them distinct)" in text
    assert re.search(r"at least \S+ MB on the host for the training of the whole model", text)
    assert re.search(r"training \d+ s", text)
    assert "the training's checkpoint" in text and "finished blocks" not in text


def test_several_devices_divide_what_is_held_beside_the_weights():
    model = network("llama").float()
    layers = (block_layers(block, f"model.layers.{index}") for index, block in enumerate(find_blocks(model)[1]))
    patterns = dict.fromkeys((name for found in layers for name in found), parse_sparsity("0.5"))
    one, four = (SHORT.memory(model, patterns, 4, 32, devices) for devices in (1, 4))
    waiting = 4 * sum(parameter.numel() for parameter in find_blocks(model)[1][0].parameters())
    assert one - four == pytest.approx(0.75 * SHORT.state_bytes(model, patterns, 4) - waiting, abs=2)


def test_a_last_projection_that_takes_much_is_told():
    found = [prune(network("llama").float(), dataclasses.replace(SHORT, rate=rate)) for rate in (1e-5, 0.02)]
    assert "ELSA has not converged: its last projection took 0." in found[0]["warnings"][-1]
    assert "a weight by about its rate in a step, here by 5.5e-05 in all" in found[0]["warnings"][-1]
    assert not any("converged" in note for note in found[1]["warnings"])
    assert found[0]["warnings"][-1].endswith("give a higher method.rate, a higher method.penalty, or more method.steps")
    (said,) = SHORT._far({"layer": {"distance": 0.1}}, 1e-3)  # the rates add up to 0.011
    assert said.endswith("give a higher method.penalty, more method.steps, or method.projection=magnitude")


def test_a_text_that_is_known_by_heart_is_told():
    few = dataclasses.replace(SHORT, steps=20, batch=1, tokens=24, rate=0.02)
    found = [prune(network("llama").float(), few, held_out=held) for held in (tokens()[-2:], tokens()[:1])]
    told = [note for record in found for note in record["warnings"] if "by heart" in note]
    assert len(told) == 1 and told[0] in found[0]["warnings"]
    assert re.search(r"loss is \S+ there and \S+ on held-out .* a lower method.rate, or method.others=false", told[0])


def test_choices_change_the_result():
    found = {}
    for name, changes in {"momentum": {}, "magnitude": {"projection": "magnitude"}}.items():
        model = network("llama").float()
        prune(model, dataclasses.replace(SHORT, **changes), "0.8")
        found[name] = [p.detach() for p in model.parameters()]
    assert any(not torch.equal(one, other) for one, other in zip(*found.values(), strict=True))
