"""Fine-tuning under a mask: zeros stay zeros in full and through adapters, against plain loops; what is refused."""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest
import torch
from tiny import FEW_WINDOWS, execute, load, network, tokens, weights, words_for

from alps_exp import UserError, prune_model
from alps_exp.baselines.tune import Tune, adapted, merged
from alps_exp.cli.overrides import compose
from alps_exp.model.structure import block_layers, find_blocks
from alps_exp.runs.settings import resolve
from alps_exp.training import trainer as training_trainer
from alps_exp.training.trainer import Trainer

SHORT = Tune(steps=6, batch=4, tokens=12 * 24, rate=2e-3)
LORA = dataclasses.replace(SHORT, lora=3, others=False, rate=1e-2)
CHOICES = {"full": SHORT, "pruned layers alone": dataclasses.replace(SHORT, others=False), "lora": LORA}
needs_peft = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('peft')", reason="needs peft")


def pruned(family: str = "llama", sparsity: str = "0.5", method="magnitude", **options):
    model = network(family)
    prune_model(model, tokens(), method, sparsity, losses=False, **options)
    return model


def layers(model) -> dict:
    prefix, blocks = find_blocks(model)
    found = {}
    for index, block in enumerate(blocks):
        found |= {name: layer.module for name, layer in block_layers(block, f"{prefix}.{index}").items()}
    return found


def masks(model) -> dict:
    return {name: layer.weight != 0 for name, layer in layers(model).items()}


def cross_entropy(model, rows) -> torch.Tensor:
    return -model(rows).logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None]).mean()


def follow(model, method: Tune, trained: dict, values: list, put) -> None:
    """Adam by its formulas on `values`, which `put` brings into the model before each forward.

    Args:
        trained: value's place → mask of its gradient, where there is one.
    """
    ids, (one, two) = tokens(), (0.9, 0.95)
    recipe = method.recipe()
    order = Trainer(torch.nn.Linear(1, 1), {"weight": None}, None, len(ids), recipe)
    first, second = ([torch.zeros_like(v) for v in values] for _ in range(2))
    for step in range(method.steps):
        put()
        gradients = torch.autograd.grad(cross_entropy(model, ids[order.batch(step)]), values)
        gradients = [g * trained.get(place, 1) for place, g in enumerate(gradients)]
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        for place, (value, g) in enumerate(zip(values, gradients, strict=True)):
            g = g * min(1.0, method.clip / (norm + 1e-6))
            first[place] = one * first[place] + (1 - one) * g
            second[place] = two * second[place] + (1 - two) * g.square()
            m, v = first[place] / (1 - one ** (step + 1)), second[place] / (1 - two ** (step + 1))
            value.data -= recipe.rate_at(step, 0) * m / (v.sqrt() + 1e-8)
    put()


@pytest.mark.parametrize("others", [True, False])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_all_weights_are_trained_as_by_a_plain_loop(family, others):
    ours, plain = pruned(family), pruned(family)
    before = masks(plain)
    record = prune_model(ours, tokens(), dataclasses.replace(SHORT, others=others), "0.5")
    names = [n for n, _ in plain.named_parameters() if others or n.removesuffix(".weight") in before]
    values = [plain.get_parameter(name) for name in names]
    zeros = {place: (value != 0).double() for place, value in enumerate(values) if value.ndim > 1}
    follow(plain, SHORT, zeros, values, lambda: None)
    for name, value in plain.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), value, rtol=1e-8, atol=1e-11)
    assert record["training"]["sparsity_before"] == record["training"]["sparsity_after"] == 0.5


@pytest.mark.slow
@needs_peft
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_adapters_are_trained_as_by_a_plain_loop(family):
    ours, plain = pruned(family), pruned(family)
    prune_model(ours, tokens(), LORA, "0.5")
    found = layers(plain)
    bases = {name: layer.weight.detach().clone() for name, layer in found.items()}
    start = pruned(family)
    with adapted(start, list(bases), LORA.lora, LORA.alpha) as names:
        values = [start.get_parameter(name).detach().clone().double().requires_grad_() for name in names]

    def put() -> None:
        for place, (name, layer) in enumerate(found.items()):
            a, b = values[2 * place : 2 * place + 2]
            layer._parameters.pop("weight", None)
            layer.weight = bases[name] + (bases[name] != 0) * (LORA.alpha / LORA.lora) * (b @ a)

    follow(plain, LORA, {}, values, put)
    for name, layer in layers(ours).items():
        torch.testing.assert_close(layer.weight, found[name].weight, rtol=1e-4, atol=2e-6)  # float32 masters
        assert not torch.equal(layer.weight, bases[name])


@needs_peft
@pytest.mark.parametrize("family", ["llama", "opt", "gpt-neox"])
def test_a_layer_with_an_adapter_is_its_merged_weight(family):
    model = pruned(family).float()
    plain = {name: layer for name, layer in layers(model).items()}
    before = masks(model)
    with adapted(model, list(plain), 2, 8.0) as names, torch.no_grad():
        for name in names:
            model.get_parameter(name).normal_(std=0.1)
        during = model(tokens()).logits
        weights = {name: merged(model.get_submodule(name)) for name in plain}
    assert layers(model) == plain and not any("lora" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, during)
    for name, layer in plain.items():
        assert torch.equal(layer.weight, weights[name]) and torch.equal(layer.weight != 0, before[name])
    with pytest.raises(ZeroDivisionError), adapted(model, list(plain), 2, 8.0):
        raise ZeroDivisionError
    assert layers(model) == plain and all(torch.equal(layer.weight, weights[name]) for name, layer in plain.items())


@pytest.mark.parametrize(
    ("dtype", "sparsity"), [(torch.float32, "0.9"), (torch.bfloat16, "2:4"), (torch.float16, "0.5")], ids=str
)
@pytest.mark.parametrize("method", [SHORT, pytest.param(LORA, marks=needs_peft)], ids=["full", "lora"])
def test_zeros_stay_zeros(method, dtype, sparsity):
    model = pruned(sparsity=sparsity).to(dtype)
    other = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = masks(model)
    record = prune_model(model, tokens(), dataclasses.replace(method, rate=1e-3), sparsity, held_out=tokens(15)[12:])
    after, training = masks(model), record["training"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert training["sparsity_before"] == training["sparsity_after"] and training["after"] <= training["before"]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, other[name])}
    if method is LORA and training["kept"]:
        assert changed and changed <= {f"{name}.weight" for name in before}


def test_layers_that_the_run_leaves_out_keep_their_zeros_too():
    model = pruned()
    before = masks(model)
    record = prune_model(model, tokens(), SHORT, "0.5", include=["*mlp*"])
    assert len(record["layers"]) == 6
    after = masks(model)
    assert len(before) == 14 and all(torch.equal(before[name], after[name]) for name in before)


# Runs of the command line.


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    words = words_for(tiny_llama, text_file, *FEW_WINDOWS, "sparsity=0.8", "save=true")
    record = execute([*words, "method=magnitude"], folder)
    return folder / "model", record["evaluations"][0]["value"]


@pytest.fixture
def words(checkpoint, text_file) -> list[str]:
    found = words_for(checkpoint[0], text_file, *FEW_WINDOWS, "sparsity=0.8", "save=true")
    return [*found, "method.steps=40", "method.batch=4", "data.holdout=4", "method.saved=3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [["method=tune", "method.rate=0.002"], pytest.param(["method=tune-lora", "method.rate=0.01"], marks=needs_peft)],
    ids=["full", "lora"],
)
def test_a_pruned_checkpoint_gains_and_reloads(words, checkpoint, more, tmp_path, capsys):
    record = execute([*more, *words], tmp_path)
    assert record["evaluations"][0]["value"] < 0.8 * checkpoint[1]
    training = record["training"]
    assert training["after"] < training["before"] and training["sparsity_before"] == training["sparsity_after"]
    zeros = f"{training['sparsity_before']:.6f}"
    assert f"zeros {zeros} before, {zeros} after" in capsys.readouterr().out
    before, after = masks(load(checkpoint[0])), masks(load(tmp_path / "model"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = execute([word for word in words if "method" not in word and "model.path" not in word], tmp_path / "again",
                    "method=dense", f"model.path={tmp_path / 'model'}", "save=false")  # fmt: skip
    assert again["evaluations"][0]["value"] == record["evaluations"][0]["value"]


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "at"), [("tune", 7), *(pytest.param("tune-lora", at, marks=needs_peft) for at in (1, 4))]
)
def test_a_killed_run_goes_on_to_the_same_bits(words, tmp_path, monkeypatch, name, at):
    words = [f"method={name}", *words, "method.steps=8", "method.rate=0.003", "method.tokens=1024", "eval=none"]
    execute(words, tmp_path / "whole")
    inner = Trainer._step

    def step(self, number):
        if number == at:
            raise Killed
        inner(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        patch.setattr(training_trainer, "_WORTH", 0)
        with pytest.raises(Killed):
            execute(words, tmp_path / "killed")
    steps = []
    monkeypatch.setattr(Trainer, "_step", lambda self, number: (steps.append(number), inner(self, number)))
    execute(words, tmp_path / "killed")
    assert steps == list(range(at, 8))
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


REFUSED = {
    "targets": ("method=tune-lora method.targets=[*.proj]", r"targets=\['\*\.proj'\] matches no layer that is pruned"),
    "no list": ("method=tune method.targets=q_proj", "method.targets=q_proj is not allowed: give a list of globs"),
    "rank": ("method=tune-lora method.lora=0", "method.lora=0 is not allowed"),
    "both": ("method=tune method.lora=4", "trains adapters and nothing else: give method.others=false"),
    "allocation": ("method=tune allocation=atp", "Tune takes it from a mask: give allocation=uniform"),
    "devices": (
        "method=tune method.batch=2 devices=3",
        "windows are fewer than devices=3: give a larger batch, or fewer devices",
    ),
    "stream": ("method=tune stream=true", "tune trains all blocks at once"),
    "finish": ("method=tune finish=distil", "tune trains its weights"),
}


@needs_peft
@pytest.mark.parametrize(("more", "message"), REFUSED.values(), ids=list(REFUSED))
def test_mistakes_are_refused_before_anything_runs(words, more, message):
    first, *rest = more.split()
    with pytest.raises(UserError, match=message) as error:
        resolve(compose([first, *words, *rest]))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_what_is_not_pruned_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(Trainer, "run", None)
    with pytest.raises(UserError, match=r"has none in the layers of this run: give the model\.path of a"):
        prune_model(network("llama"), tokens(), SHORT, "0.5")
    with pytest.raises(UserError, match=r"has 0\.5 zeros, and sparsity=0\.7 was asked for: give sparsity=0\.5"):
        prune_model(pruned(), tokens(), SHORT, "0.7")
    with pytest.raises(UserError, match=r"q_proj is not 2:4: give its sparsity, 0.5, or its own pattern"):
        prune_model(pruned(), tokens(), SHORT, "2:4")
    with pytest.raises(UserError, match=r"q_proj is not block=4@0.5: give its sparsity, 0.5, or its own pattern"):
        prune_model(pruned(), tokens(), SHORT, "block=4@0.5")
    mixed, own = network("llama"), {"*.q_proj": "2:4"}
    prune_model(mixed, tokens(), "magnitude", "0.5", layer_sparsity=own)
    with pytest.raises(UserError, match=r"has 0\.5 zeros, and sparsity=0\.7 was asked for"):  # of the others
        prune_model(mixed, tokens(), SHORT, "0.7", layer_sparsity=own)


@needs_peft
def test_an_adapter_of_a_dense_layer_is_refused(monkeypatch):
    model = pruned(exclude=["*.1.mlp.down_proj"])
    monkeypatch.setattr(Trainer, "run", None)
    one = dataclasses.replace(LORA, targets=("*down_proj",), tolerance=0.1)
    with pytest.raises(UserError, match=r"method.targets: model.layers.1.mlp.down_proj has no zeros, and adapters"):
        prune_model(model, tokens(), one, "0.5")


def test_adapters_without_peft_are_refused_with_the_line_that_helps(words, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"method\.lora needs peft.*: pip install --no-deps peft"):
        resolve(compose(["method=tune-lora", *words]))
