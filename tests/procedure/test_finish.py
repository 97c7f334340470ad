"""Finishing: blocks against a plain loop of autograd, distillation, zeros, resumed runs, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import tiny_models
import torch
from helpers import Served
from tiny import FEW_WINDOWS, execute, network, tokens, weights, words_for
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from alps_exp import LayerSolver, Solution, Statistics, UserError, prune_model
from alps_exp.cli.overrides import compose
from alps_exp.evaluation import perplexity
from alps_exp.model.blocks import BlockModel
from alps_exp.model.structure import block_layers, find_blocks
from alps_exp.procedure import distil as procedure_distil
from alps_exp.runs import together
from alps_exp.runs.naming import Configuration
from alps_exp.runs.settings import resolve
from alps_exp.training import optimisers
from alps_exp.training import trainer as training_trainer
from alps_exp.training.finish import BlockFinish, Distillation, Finish, Finishing, build_finish
from alps_exp.training.recipe import Recipe
from alps_exp.training.trainer import Trainer

CPU = torch.device("cpu")
BOTH = Finish(BlockFinish(epochs=2, rate=3e-4), Distillation(epochs=2, rate=1e-4))
CHOICES = {"block": Finish(block=BOTH.block), "distil": Finish(distil=BOTH.distil), "block+distil": BOTH}


def prune(model: nn.Module, finish: Finish | str, method="magnitude", sparsity="0.5", **options) -> dict:
    options = {"batch_size": 5, "held_out": tokens(15)[12:], **options}
    return prune_model(model, tokens(), method, sparsity, finish=finish, **options)


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    prefix, blocks = find_blocks(model)
    found = {}
    for index, block in enumerate(blocks):
        found |= {name: layer.weight != 0 for name, layer in block_layers(block, f"{prefix}.{index}").items()}
    return found


class Outputs:
    """What the blocks of a model give in whole forwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.found = model, {}
        for index, block in enumerate(find_blocks(model)[1]):
            block.register_forward_hook(self._keep(index))

    def _keep(self, index: int):
        def hook(module, args, output) -> None:
            self.found[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def of(self, index: int, ids: torch.Tensor) -> torch.Tensor:
        self.model(ids, use_cache=False)
        return self.found[index]


class Adam:
    """By its formulas, with masked gradients."""

    def __init__(self, parameters: list[nn.Parameter], recipe: Recipe) -> None:
        self.recipe, self.step = recipe, 0
        sizes = [float(p.detach()[p != 0].double().square().mean().sqrt()) for p in parameters]
        self.shares = [2 ** (round(4 * math.log2(size / recipe.size)) / 4) for size in sizes]
        self.state = [(p, p != 0, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        one, two = self.recipe.betas
        gradients = [p.grad * mask for p, mask, _, _ in self.state]
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        scale = min(1.0, self.recipe.clip / norm) if self.recipe.clip else 1.0
        rate = self.recipe.rate_at(self.step, 0)
        self.step += 1
        for (p, _, m, v), gradient, share in zip(self.state, gradients, self.shares, strict=True):
            m.mul_(one).add_((1 - one) * scale * gradient)
            v.mul_(two).add_((1 - two) * (scale * gradient).square())
            p -= share * rate * (m / (1 - one**self.step)) / ((v / (1 - two**self.step)).sqrt() + 1e-8)
        for p, *_ in self.state:
            p.grad = None


def follow(loss, layers: list[nn.Module], recipe: Recipe, windows: int) -> None:
    """The plain loop: steps along loss(numbers, held out), and the best of all looks."""
    order = Trainer(nn.Linear(1, 1), {"weight": None}, loss, windows, recipe)
    adam = Adam([layer.weight for layer in layers], recipe)
    looks, seen = [0, *recipe.looks()], []
    for step in range(recipe.steps + 1):
        if step in looks:
            with torch.no_grad():
                seen.append((loss(range(3), True).item(), [layer.weight.clone() for layer in layers]))
        if step < recipe.steps:
            loss(order.batch(step), False).backward()
            adam.update()
    for layer, weight in zip(layers, min(seen, key=lambda pair: pair[0])[1], strict=True):
        layer.weight.data.copy_(weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "fresh"),
    [*((family, 0) for family in ("llama", "gemma3", "opt", "opt-350m", "gpt-neox")), ("llama", 5)],
)
def test_blocks_are_finished_as_by_a_plain_loop(family, fresh):
    ours, plain, ids = network(family), network(family), tokens(20)
    choice = dataclasses.replace(CHOICES["block"].block, fresh=bool(fresh))
    record = prune(ours, Finish(block=choice), fresh=ids[15:] if fresh else None)
    assert prune(plain, "none")["summary"]["layers"] == record["summary"]["layers"]
    dense = Outputs(network(family))
    prefix, blocks = find_blocks(plain)
    for index, block in enumerate(blocks):
        outputs = Outputs(plain)

        def loss(numbers, held_out, index=index, outputs=outputs):
            # 12 windows to calibrate on, three that are held out, then fresh ones.
            rows = ids[[n + 12 if held_out else n if n < 12 else n + 3 for n in numbers]]
            with torch.no_grad():
                wanted = dense.of(index, rows)
            return ((outputs.of(index, rows) - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()

        layers = [layer.module for layer in block_layers(block, f"{prefix}.{index}").values()]
        follow(loss, layers, choice.recipe(12 + fresh, 32, None), 12 + fresh)
        found = record["finish"]["blocks"][index]
        assert found["block"] == index and found["after"] < found["before"]
        assert found["after"] == pytest.approx(loss(range(3), True).item(), rel=2e-4)
    for name in masks(plain):
        one, other = (model.get_submodule(name).weight for model in (ours, plain))
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "opt-350m"])
def test_the_model_is_distilled_as_by_a_plain_loop(family):
    ours, plain, dense, ids = network(family), network(family), network(family), tokens(15)
    record = prune(ours, CHOICES["distil"])
    prune(plain, "none")

    def loss(numbers, held_out):
        rows = ids[[number + 12 * held_out for number in numbers]]
        with torch.no_grad():
            p = dense(rows).logits.softmax(-1)
        return (p * (p.log() - plain(rows).logits.log_softmax(-1))).sum(-1).mean()

    layers = [plain.get_submodule(name) for name in masks(plain)]
    follow(loss, layers, CHOICES["distil"].distil.recipe(12, 32, None), 12)
    found = record["finish"]["distil"]
    assert found["after"] < found["before"]
    assert found["after"] == pytest.approx(loss(range(3), True).item(), rel=1e-4)
    for name in masks(plain):
        one, other = (model.get_submodule(name).weight for model in (ours, plain))
        torch.testing.assert_close(one, other, rtol=2e-3, atol=5e-5)
    assert record["finish"]["layer_losses"] == "before the distillation"
    assert (found["steps"], found["windows"], found["tokens"]) == (6, 24, 24 * 24)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "opt-350m"])
def test_logits_in_pieces_make_the_same_distillation(family, monkeypatch):
    whole, pieces = network(family), network(family)
    records = [prune(whole, CHOICES["distil"])]
    monkeypatch.setattr(procedure_distil, "_LOGITS", 7 * whole.config.vocab_size)  # 24 positions: four pieces of 6
    sizes, inner = [], BlockModel.logits
    monkeypatch.setattr(BlockModel, "logits", lambda *given: sizes.append(inner(*given)) or sizes[-1])
    records.append(prune(pieces, CHOICES["distil"]))
    assert (
        {(1, 6)} <= {tuple(made.shape[:2]) for made in sizes} <= {(1, 6), (1, 12)}
    )  # 12 to see whether it is faithful
    one, other = (record["finish"]["distil"] for record in records)
    assert other["after"] == pytest.approx(one["after"], rel=1e-5)
    for name in masks(whole):
        ours, theirs = (model.get_submodule(name).weight for model in (whole, pieces))
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=5e-5)


@pytest.mark.parametrize(
    ("finish", "sparsity"),
    [
        *(("block", sparsity) for sparsity in ("0.5", "2:4", "1:4")),
        *(("distil", sparsity) for sparsity in ("0.9", "2:4")),
        *(("block+distil", sparsity) for sparsity in ("0.5", "4:8")),
    ],
)
def test_zeros_stay_where_they_are_in_their_exact_number(finish, sparsity):
    finished, plain = network("llama").float(), network("llama").float()
    own = {"*k_proj": "0.25"} if sparsity == "2:4" else {}
    record = prune(finished, CHOICES[finish], "wanda", sparsity, layer_sparsity=own)
    other = prune(plain, "none", "wanda", sparsity, layer_sparsity=own)
    before, after = masks(plain), masks(finished)
    if finish == "distil":  # the blocks saw the same inputs
        assert all(torch.equal(before[name], after[name]) for name in before)
    for name, mask in before.items():
        assert mask.sum() == after[name].sum()
        if ":" in sparsity and "k_proj" not in name:
            kept, width = map(int, sparsity.split(":"))
            assert int(after[name].view(-1, width).sum(1).max()) <= kept
    assert [row["sparsity"] for row in record["layers"]] == [row["sparsity"] for row in other["layers"]]
    changed = [not torch.equal(finished.get_submodule(n).weight, plain.get_submodule(n).weight) for n in before]
    assert all(changed)
    zeros, made = sum(int((~mask).sum()) for mask in before.values()), record["finish"]
    if "distil" in made:
        assert made["distil"]["zeros"] == zeros
    assert sum(row["zeros"] for row in made.get("blocks", [])) == (zeros if "block" in finish else 0)


@dataclass(frozen=True)
class Keep(LayerSolver):
    """Prunes nothing, and is treated as if it did."""

    statistics: ClassVar[Statistics] = Statistics.NONE

    def _solve(self, problem, pattern) -> Solution:
        return Solution(problem.weight, torch.ones_like(problem.weight, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_lost_nothing_stays_as_it_is(dtype):
    model, dense = network("llama").to(dtype), network("llama").to(dtype)
    record = prune(model, BOTH, Keep())
    if dtype is torch.float32:
        assert [block["before"] for block in record["finish"]["blocks"]] == [0.0, 0.0]
        assert {block["kept"] for block in record["finish"]["blocks"]} == {0}
    assert record["finish"]["distil"]["after"] <= record["finish"]["distil"]["before"] < 2e-2
    before, after = (model(tokens()).logits.float() for model in (dense, model))
    tolerance = 1e-4 if dtype is torch.float32 else 0.2
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance * before.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "opt-350m", "gpt-neox"])
def test_half_precision_stays_half_precision(dtype, precision, family):
    model = network(family).to(dtype)
    norms = {name: p.detach().clone() for name, p in model.named_parameters() if "norm" in name or "embed" in name}
    finish = Finish(BlockFinish(epochs=1, precision=precision), Distillation(epochs=1, precision=precision))
    record = prune(model, finish)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(torch.equal(model.get_parameter(name), p) for name, p in norms.items())
    assert all(block["after"] < block["before"] for block in record["finish"]["blocks"])
    assert record["summary"]["sparsity"] == 0.5
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_methods_without_statistics_and_blocks_without_layers_are_finished_too():
    model = network("llama").float()
    record = prune(model, CHOICES["block"], losses=False, exclude=["model.layers.0.*"])
    assert [block["block"] for block in record["finish"]["blocks"]] == [1]
    assert record["finish"]["blocks"][0]["after"] < record["finish"]["blocks"][0]["before"]
    assert {row["relative_loss"] for row in record["layers"]} == {None}
    assert record["drift"][-1]["calibration"]["mean"] > 0


def test_rows_are_measured_on_the_finished_block():
    finished, plain = network("llama"), network("llama")
    record, other = prune(finished, CHOICES["block"]), prune(plain, "none")
    dense = network("llama")
    inputs = {}
    layer = plain.get_submodule("model.layers.0.self_attn.q_proj")
    layer.register_forward_pre_hook(lambda module, args: inputs.update(x=args[0].flatten(0, 1)))
    with torch.no_grad():
        plain(tokens())
    w = dense.get_submodule("model.layers.0.self_attn.q_proj").weight
    v = finished.get_submodule("model.layers.0.self_attn.q_proj").weight
    expected = ((inputs["x"] @ (w - v).T).square().sum() / (inputs["x"] @ w.T).square().sum()).item()
    assert record["layers"][0]["relative_loss"] == pytest.approx(expected, rel=1e-4)
    assert record["layers"][0]["relative_loss"] != pytest.approx(other["layers"][0]["relative_loss"], rel=1e-3)


@pytest.mark.parametrize("method", ["sparsegpt", "sparsellm"])
def test_the_hidden_states_go_on_from_the_finished_block(method):
    model, dense = network("llama").float(), network("llama").float()
    target = "stream" if method == "sparsegpt" else "layer"
    record = prune(model, CHOICES["block"], method, target=target)
    wanted, found = (Outputs(net).of(1, tokens()).detach() for net in (dense, model))
    errors = (found - wanted).square().sum(-1) / wanted.square().sum(-1)
    assert record["drift"][1]["calibration"]["mean"] == pytest.approx(errors[:, 1:].mean().item(), rel=1e-3)
    assert all(block["after"] < block["before"] for block in record["finish"]["blocks"])


@pytest.mark.slow
def test_a_device_that_is_short_of_memory_takes_smaller_steps(monkeypatch):
    expected = network("llama").float()
    prune(expected, BOTH)
    inner = Trainer._gradients

    def short(self, *more):
        return None if self.micro > 1 else inner(self, *more)

    monkeypatch.setattr(Trainer, "_gradients", short)
    model = network("llama").float()
    record = prune(model, BOTH)
    assert record["finish"]["distil"]["micro"] == 1 and record["finish"]["blocks"][1]["micro"] == 1
    notes = [note for note in record["warnings"] if "gradients of" in note]
    assert len(notes) == 2  # the second block and the distillation know it from the start
    for name in masks(model):
        one, other = (net.get_submodule(name).weight for net in (model, expected))
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-4)


@pytest.mark.slow
def test_activations_can_be_made_again(monkeypatch):
    expected = network("llama").float()
    prune(expected, CHOICES["distil"])
    inner, done = Trainer._gradients, []

    def short(self, *more):
        if len(done) < 3:
            done.append(self.micro)
            return None
        return inner(self, *more)

    monkeypatch.setattr(Trainer, "_gradients", short)
    model = network("llama").float()
    record = prune(model, CHOICES["distil"])
    assert any("made again in the backward pass" in note for note in record["warnings"])
    assert all("forward" not in vars(block) for block in find_blocks(model)[1])
    for name in masks(model):
        one, other = (net.get_submodule(name).weight for net in (model, expected))
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-4)


# Runs of the command line.


@pytest.fixture
def words(tiny_llama: Path, text_file: Path) -> list[str]:
    own = ["method=wanda", "sparsity=0.7", "save=true", "data.holdout=4", "resumable=true"]
    return words_for(tiny_llama, text_file, *FEW_WINDOWS, *own)


@pytest.fixture
def other_text(tmp_path) -> Path:
    path = tmp_path / "other.txt"
    path.write_text("\n".join(tiny_models.documents(60, seed=11)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plain_perplexity(tiny_llama, text_file, tmp_path_factory) -> float:
    found = words_for(tiny_llama, text_file, *FEW_WINDOWS, "method=wanda", "sparsity=0.7")
    return execute(found, tmp_path_factory.mktemp("plain"))["evaluations"][0]["value"]


def larger_steps(finish: str) -> list[str]:
    """Few steps, and a width of 64, which the default rates are small for."""
    rates = {"block": "finish.block.rate=0.004", "distil": "finish.distil.rate=0.002"}
    return [rate for stage, rate in rates.items() if stage in finish]


@pytest.mark.slow
@pytest.mark.parametrize("finish", ["block", "distil", "[block,distil]"])
def test_a_trained_model_gains_from_each(words, finish, tmp_path, plain_perplexity):
    record = execute([*words, *larger_steps(finish)], tmp_path, f"finish={finish}")
    assert record["evaluations"][0]["value"] < 0.95 * plain_perplexity
    assert record["config"]["finish"]["name"] == finish.strip("[]").replace(",", "+")
    assert ("finish_seconds" in record["phases"]) == ("block" in finish)
    assert ("distil_seconds" in record["phases"]) == ("distil" in finish)
    assert record["calibration"]["held_out_windows"] == 4
    for training in [*record["finish"].get("blocks", []), *filter(None, [record["finish"].get("distil")])]:
        assert training["after"] < training["before"] and training["tokens"] == training["windows"] * 64
        assert [row["step"] for row in training["curve"]] == [0, 2, 4, 6, 8]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    for row in record["layers"]:
        assert 1 - masks(saved)[row["name"]].double().mean().item() == pytest.approx(row["sparsity"], abs=1e-12)
        assert row["sparsity"] == pytest.approx(0.7, abs=0.02)  # whole rows


@pytest.mark.slow
def test_a_real_tiny_model_gains_at_70_percent(shared):
    folder = shared / "data/stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (shared / "data/wikitext-2/wiki.test.raw").read_text(encoding="utf-8")
    ids = tokenizer(text[:120_000], return_tensors="pt", verbose=False).input_ids[0]
    ids = ids[: 36 * 256].view(36, 256)
    found = {}
    for choice in ("none", "block", "distil"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        prune_model(model, ids[:16], "sparsegpt", 0.7, finish=choice, held_out=ids[16:20], batch_size=4)
        found[choice] = perplexity.perplexity(BlockModel(model, CPU), ids[20:], 8, quiet=True)
    assert max(found["block"], found["distil"]) < 0.8 * found["none"]


class Killed(BaseException):
    pass


def kill(monkeypatch, at: int) -> None:
    """End the process, as it were, in the step of this number of all trainings, or after the last, where checkpoints
    are written whenever there may be one."""
    monkeypatch.setattr(training_trainer, "_WORTH", 0)
    steps, inner = [0], Trainer._step

    def step(self, number):
        if steps[0] == at:
            raise Killed
        steps[0] += 1
        inner(self, number)

    monkeypatch.setattr(Trainer, "_step", step)


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 13, 16, 21])  # both blocks, the distillation and behind a checkpoint
def test_a_killed_run_goes_on_to_the_same_bits(words, tmp_path, tmp_path_factory, monkeypatch, at):
    words = [*words, "finish=[block,distil]"]
    if not hasattr(test_a_killed_run_goes_on_to_the_same_bits, "whole"):
        test_a_killed_run_goes_on_to_the_same_bits.whole = tmp_path_factory.mktemp("whole")
        execute(words, test_a_killed_run_goes_on_to_the_same_bits.whole)
    whole = test_a_killed_run_goes_on_to_the_same_bits.whole
    with monkeypatch.context() as patch:
        kill(patch, at)
        with pytest.raises(Killed):
            execute(words, tmp_path)
    steps = []
    with monkeypatch.context() as patch:
        inner = Trainer._step
        patch.setattr(Trainer, "_step", lambda self, number: (steps.append(number), inner(self, number)))
        record = execute(words, tmp_path)
    one, other = weights(tmp_path), weights(whole)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert record["attempts"] == 2
    assert len(steps) == 24 - (at // 8) * 8 - (2 * ((at - 16) // 2) if at > 16 else 0)  # not all over again
    assert not (tmp_path / ".progress").exists()


@pytest.mark.slow
def test_blocks_read_from_files_are_finished_to_the_same_bits(words, tmp_path):
    kept = execute([*words, "finish=block"], tmp_path / "memory")
    streamed = execute([*words, "finish=block", "stream=true"], tmp_path / "streamed")
    one, other = weights(tmp_path / "memory"), weights(tmp_path / "streamed")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [b["after"] for b in kept["finish"]["blocks"]] == [b["after"] for b in streamed["finish"]["blocks"]]


@pytest.mark.slow
def test_a_team_finishes_and_distils_together(words, tmp_path, plain_perplexity, monkeypatch):
    monkeypatch.setattr(together, "_start", Served)
    words = [*words, "finish.tokens=300", "finish.block.fresh=true"]
    record = execute([*words, "finish=[block,distil]", *larger_steps("block,distil"), "devices=2"], tmp_path)
    alone = execute([*words, "finish=block", *larger_steps("block")], tmp_path / "alone")
    assert alone["finish"]["blocks"][0]["windows"] == 4 * (8 + 5)
    assert alone["drift"][0].keys() == record["drift"][0].keys() == {"calibration", "held out"}
    for one, other in zip(record["finish"]["blocks"], alone["finish"]["blocks"], strict=True):
        assert (one["steps"], one["windows"], one["tokens"]) == (other["steps"], other["windows"], other["tokens"])
        assert one["before"] == pytest.approx(other["before"], rel=0.05)
        assert one["after"] == pytest.approx(other["after"], rel=0.1)  # other windows come together
    assert record["finish"]["distil"]["after"] < record["finish"]["distil"]["before"]
    assert record["evaluations"][0]["value"] < 0.9 * plain_perplexity


@pytest.mark.slow
def test_two_processes_distil_as_one(words, tmp_path, other_text, monkeypatch):
    monkeypatch.setattr(together, "_start", Served)
    words = [*words, "finish=distil", "method=magnitude", "losses=false", "finish.distil.batch=3"]
    words += ["finish.tokens=500", f"finish.path={other_text}"]  # 8 windows beside 8; the steps need not divide
    one = execute(words, tmp_path / "one")["finish"]["distil"]
    record = execute([*words, "devices=2"], tmp_path / "two")
    two = record["finish"]["distil"]
    for key in ("steps", "windows", "tokens", "fresh_tokens", "kept", "ended"):
        assert one[key] == two[key], key
    assert [row["held_out"] for row in two["curve"]] == pytest.approx([row["held_out"] for row in one["curve"]], 1e-4)
    found, wanted = weights(tmp_path / "two"), weights(tmp_path / "one")
    for name, weight in wanted.items():
        assert torch.equal(found[name] != 0, weight != 0)
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4 * weight.abs().max().item())
    assert record["finish"]["text"]["windows"] == 8 and record["attempts"] == 1


@pytest.mark.slow
def test_fresh_text_joins_the_calibration_windows(words, tmp_path):
    plain = execute([*words, "finish=distil"], tmp_path / "plain")
    more = execute([*words, "finish=distil", "finish.distil.windows=20", "finish.distil.epochs=1"], tmp_path / "more")
    assert more["calibration"]["fresh_windows"] == 12 and more["calibration"]["windows"] == 8
    assert more["finish"]["distil"]["windows"] == 20 and more["finish"]["distil"]["steps"] == 5
    assert [row["relative_loss"] for row in more["layers"]] == [row["relative_loss"] for row in plain["layers"]]
    assert more["finish"]["distil"]["before"] == plain["finish"]["distil"]["before"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("finish=block data.holdout=0", "finish=block needs windows that are held out"),
        ("finish=[block,distil] data.holdout=0", "finish=block+distil needs windows that are held out"),
        ("finish=block finish.block.rate=0", "finish.block.rate=0 is not allowed: give a number above 0"),
        ("finish=distil finish.distil.epochs=0", "finish.distil.epochs=0 is not allowed: give a whole number from 1"),
        ("finish=distil finish.distil.minutes=0", "finish.distil.minutes=0 is not allowed"),
        ("finish=[block,distil] finish.minutes=0", "finish.minutes=0 is not allowed: give a number above 0"),
        ("finish=block finish.minutes=soon", "finish.minutes='soon' is not allowed"),
        ("finish=block finish.block.precision=half", "finish.block.precision='half' is not allowed"),
        ("finish=distil finish.distil=5", "finish.distil=5 is not allowed: give its keys, as in finish.distil.epochs"),
        ("finish=distil finish.distil=null", "finish.distil=None is not allowed: give its keys"),
        ("finish=blok", "unknown finish 'blok'; did you mean block?"),
        ("finish=[block,foo]", "unknown finish 'foo'; known: block, distil, none"),
        ("finish=[block,3]", "finish=[block,3] is a list"),
        ("finish=block finish.block.fresh=true", "finish.block.fresh=true trains on fresh text: say how much"),
        ("finish=block finish.tokens=99", "finish.tokens=99 is text to distil on: give finish=distil, [block,distil]"),
        ("finish=block finish.block.epoch=3", "unknown key 'finish.block.epoch'"),
        ("finish=distil finish.block.epochs=3", "unknown key 'finish.block"),
        ("finish=block method=dense", "finish=block finishes what was pruned, and method=dense prunes nothing"),
        ("finish=block propagate=dense", "finish=block makes up for what pruned blocks have lost"),
        ("finish=block devices=3", "finish.block.batch=4 windows do not divide among devices=3: give a multiple"),
        ("finish=distil devices=5", "finish.distil.batch=4 windows are fewer than devices=5: give a larger batch"),
        ("finish=distil stream=true", "finish=distil trains all blocks at once and needs the model in memory"),
        ("finish=distil finish.distil.windows=4", "finish.distil.windows=4 is less than the calibration windows"),
        ("finish=block finish.block.state=8bit", "state=8bit needs torchao or bitsandbytes"),
        ("finish=distil finish.tokens=99 finish.data=c5", "finish.data=c5: unknown data set 'c5'; "),
        ("finish=distil finish.tokens=99 finish.path=no.txt", "finish.path=no.txt does not exist; give one of .txt"),
        ("finish=distil finish.tokens=99 finish.data=generated finish.path=a.txt", "finish.data=generated has no file"),
        ("finish=distil finish.path=a.txt", "finish.path=a.txt is text to distil on: say how much"),
    ],
    ids=lambda text: text[:60],
)
def test_what_cannot_be_is_refused_in_one_line(words, more, said, monkeypatch):
    monkeypatch.setattr(optimisers, "_EIGHT_BIT", ("nowhere.optim",))
    with pytest.raises(UserError) as caught:
        resolve(compose([*words, *more.split(" ")]))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_distillation_that_does_not_fit_into_host_memory_is_refused_before_it_prunes(monkeypatch):
    monkeypatch.setattr("alps_exp.procedure.distil.free_host", lambda: 0)
    model = network("llama")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with pytest.raises(UserError, match=r"finish=distil needs at least \S+ GB of memory .*, and cpu has \S+ GB: give"):
        prune(model, "distil")
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_minutes_of_both_are_divided():
    both = Finish(BlockFinish(), Distillation(), minutes=10)
    assert both.block_minutes == 5 and both.distil_minutes(120) == 8 and both.distil_minutes(3600) == 1
    assert Finish(block=BlockFinish(), minutes=10).block_minutes == 10
    own = Finish(BlockFinish(minutes=2), Distillation(minutes=3), minutes=10)
    assert own.block_minutes == 2 and own.distil_minutes(120) == 3 and own.distil_minutes(540) == 1
    assert BOTH.block_minutes is BOTH.distil_minutes(60) is None


def test_minutes_bound_both_stages():
    epochs = {"epochs": 500}
    finish = Finish(BlockFinish(**epochs), Distillation(**epochs), minutes=1e-4)
    found = prune(network("llama"), finish)["finish"]
    assert {done["ended"] for done in [*found["blocks"], found["distil"]]} == {"minutes"}
    assert all(done["steps"] < done["planned"] for done in [*found["blocks"], found["distil"]])


def test_no_minutes_leave_the_name_as_it_was(words):
    words = [*words, "finish=[block,distil]"]
    one, other, bound = (
        Configuration.of(compose([*words, *more])) for more in ([], ["finish.minutes=null"], ["finish.minutes=3"])
    )
    assert one.digest == other.digest != bound.digest and "minutes" not in one.content["finish"]
    assert bound.digest == Configuration.of(compose([*words, "finish.minutes=3.0"])).digest


@pytest.mark.slow
def test_a_text_that_is_too_short_is_refused_before_anything_is_pruned(words, tmp_path):
    with pytest.raises(UserError, match=r"the held-out text has only \d+ windows of seqlen=64"):
        execute([*words, "finish=block", "data.holdout=99999"], tmp_path / "one")
    with pytest.raises(UserError, match=r"the fresh text has only \d+ windows .* lower finish.distil.windows"):
        execute([*words, "finish=distil", "finish.distil.windows=99999"], tmp_path / "two")


@pytest.mark.slow
def test_no_finish_changes_no_name_and_the_order_of_stages_none_either(words):
    digests = {}
    for more in ("", "finish=none", "finish=block", "finish=[block,distil]", "finish=[distil,block]", "finish=[block]"):
        digests[more] = Configuration.of(compose([*words, *filter(None, [more])])).digest
    assert digests[""] == digests["finish=none"]
    assert digests["finish=block"] == digests["finish=[block]"] != digests[""]
    assert "fresh" not in Configuration.of(compose([*words, "finish=block"])).content["finish"]["block"]
    assert digests["finish=[block,distil]"] == digests["finish=[distil,block]"] != digests["finish=block"]
    whole = Configuration.of(compose([*words, "finish=block", "finish.block.clip=1"])).digest
    assert whole == Configuration.of(compose([*words, "finish=block", "finish.block.clip=1.0"])).digest


def test_the_rate_goes_with_the_width():
    choice = BlockFinish(rate=1e-3, epochs=3)
    for width, rate in ((576, 1e-3), (4 * 576, 5e-4)):
        recipe = choice.recipe(128, width, None)
        assert recipe.rate == 1e-3 and recipe.rate_at(0, 0) == pytest.approx(rate)  # messages name what was given
    assert BlockFinish(rate=1.0).recipe(8, 36, None).rate_at(0, 0) == pytest.approx(4.0)
    assert choice.recipe(126, 576, None).steps == 96
    assert choice.recipe(8, 576, 2.5, micro=8).micro == 4


@pytest.mark.parametrize("stage", ["block", "distil"])
def test_the_rate_goes_with_the_size_of_weights(stage, monkeypatch):
    """A model that does the same with weights of other sizes is finished alike; by one rate for all it is not."""
    whole = {"block": BlockFinish(epochs=2), "distil": Distillation(epochs=2, clip=None)}
    finish, ids = Finish(**{stage: whole[stage]}), tokens(5)

    def finished(*factors: float) -> tuple[torch.Tensor, dict]:
        model = network("llama")
        for layer in model.model.layers:
            mixer, mlp = layer.self_attn, layer.mlp
            of = {layer.input_layernorm: 1 / factors[0], mixer.q_proj: factors[0], mixer.k_proj: factors[0]}
            of |= {mixer.v_proj: factors[0] * factors[1], mixer.o_proj: 1 / factors[1]}
            of |= {mlp.up_proj: factors[2], mlp.down_proj: 1 / factors[2]}
            for module, factor in of.items():
                module.weight.data *= factor
        record = prune(model, finish)["finish"]
        return model(ids).logits, (record["blocks"][0] if stage == "block" else record["distil"])

    plain, found = finished(1, 1, 1)
    other, twin = finished(1 / 16, 4, 8)
    assert found["kept"] and twin["after"] == pytest.approx(found["after"], rel=1e-4)
    assert twin["shares"][1] / twin["shares"][0] > 2 * found["shares"][1] / found["shares"][0]
    torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-3)
    inner = Finishing.recipe
    one_for_all = lambda *given, **more: dataclasses.replace(inner(*given, **more), size=None)  # noqa: E731
    monkeypatch.setattr(Finishing, "recipe", one_for_all)
    assert finished(1 / 16, 4, 8)[1]["after"] != pytest.approx(finished(1, 1, 1)[1]["after"], rel=1e-2)


def test_choices_are_built_from_their_nodes():
    assert build_finish({"name": "none"}) == Finish() and Finish().name == "none"
    assert build_finish({"name": "distil", "block": {"rate": 0.1}, "distil": {}}).name == "block+distil"
    with pytest.raises(UserError, match="finish has no stage 'head'"):
        build_finish({"name": "head", "head": {}})
    with pytest.raises(UserError, match="finish block has no hyperparameter 'speed'"):
        build_finish({"block": {"speed": 1}})


def test_python_asks_for_held_out_windows(tiny_opt):
    model = AutoModelForCausalLM.from_pretrained(tiny_opt)
    ids = torch.randint(3, tiny_models.VOCABULARY, (3, 16))
    with pytest.raises(UserError, match=r"finish=distil needs windows that are held out.*prune_model: held_out"):
        prune_model(model, ids, "magnitude", finish="distil")
    with pytest.raises(UserError, match="held_out has windows of 8 tokens and tokens of 16"):
        prune_model(model, ids, "magnitude", finish="block", held_out=ids[:, :8])
    with pytest.raises(UserError, match="unknown finish 'blocks'"):
        prune_model(model, ids, "magnitude", finish="blocks", held_out=ids)
    record = prune_model(model, ids, "magnitude", finish="block+distil", held_out=ids[:2])
    assert record["config"]["finish"]["name"] == "block+distil"
    assert record["config"]["finish"]["distil"]["epochs"] == 4
