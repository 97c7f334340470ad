"""Sensitivity of outputs against a plain backward pass, and what is made of it: row factors and allocations."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import interrupted
from tiny import CONFIGS, execute, network, random_tokens, tokens, weights
from tiny_models import documents
from transformers import AutoModelForCausalLM, AutoTokenizer

import alps_exp
from alps_exp.allocation.allocations import BySensitivity, FromFile, Progression, Uniform, exact_levels
from alps_exp.allocation.prunable import linear_shapes
from alps_exp.allocation.selection import Selection
from alps_exp.base.errors import UserError
from alps_exp.calibration.sensitivity import Sensitivity, SensitivityChoice, measure_sensitivity
from alps_exp.evaluation.perplexity import perplexity
from alps_exp.model.blocks import BlockModel
from alps_exp.patterns import parse_sparsity

CPU = torch.device("cpu")


def plain_pass(model, names, windows):
    """f, d, and all scores, with the whole model in one graph."""
    outputs, inputs, kept = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), {}

    def hook_of(name):
        def hook(module, args, output):
            output.retain_grad()
            kept[name] = (args[0].detach(), output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum").backward()
        for name, (x, y) in kept.items():
            outputs[name] = outputs[name] + y.grad.reshape(-1, y.shape[-1]).square().sum(0)
            inputs[name] = inputs[name] + x.reshape(-1, x.shape[-1]).square().sum(0)
    for handle in handles:
        handle.remove()
    scores = {
        name: outputs[name][:, None] * model.get_submodule(name).weight.detach().square() * inputs[name]
        for name in names
    }
    return outputs, inputs, scores


@pytest.mark.parametrize("family", CONFIGS)
def test_moments_are_those_of_a_plain_backward_pass(family):
    model, selection = network(family), Selection()
    names = linear_shapes(model, selection)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    found = measure_sensitivity(BlockModel(model, CPU), tokens(3), names, selection.excluded, quiet=True)
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    outputs, inputs, scores = plain_pass(model, names, tokens(3))
    for name in names:
        torch.testing.assert_close(found.outputs[name], outputs[name], rtol=1e-5, atol=0)
        torch.testing.assert_close(found.inputs[name], inputs[name], rtol=1e-5, atol=0)
        order = scores[name].flatten().sort().values
        for share in (0.1, 0.5, 0.9):  # bins of one per cent
            place = int(share * len(order))
            below = int((order <= order[place] * 1.02).sum())
            counted = found.counts(name).cumsum(0)
            bin_ = int(torch.searchsorted(counted, torch.tensor(place)))
            assert abs(int(counted[bin_]) - below) <= max(3, 0.03 * len(order))
    assert found.tokens == 3 * 24


def test_without_gradients_scores_are_those_of_the_inputs():
    model, selection = network("llama"), Selection()
    names = linear_shapes(model, selection)
    found = measure_sensitivity(
        BlockModel(model, CPU), tokens(3), names, selection.excluded, gradients=False, quiet=True
    )
    _, inputs, _ = plain_pass(model, names, tokens(3))
    for block in (0, 1):
        layers = [name for name in names if f".{block}." in name]
        scores = [model.get_submodule(n).weight.detach().abs() * inputs[n].sqrt() for n in layers]
        flat = torch.cat([score.flatten() for score in scores])
        share = float((flat > 3 * flat.mean()).double().mean())
        assert found.outliers(layers, 3.0) == pytest.approx(share, rel=0.03, abs=1e-3)
    assert found.outputs == {}


def test_rows_weigh_by_the_root_of_their_moments():
    found = Sensitivity(outputs={"a": torch.tensor([1.0, 4.0, 0.0, 7.0]), "b": torch.zeros(3)})
    torch.testing.assert_close(found.rows("a", 1.0)[:2], torch.tensor([1 / 3, 4 / 3]).sqrt())
    assert float(found.rows("a", 1.0)[2]) == pytest.approx(1e-3) and torch.equal(found.rows("a", 0.0), torch.ones(4))
    assert torch.equal(found.rows("b", 1.0), torch.ones(3))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["alps", "sparsegpt", "magnitude"])
def test_no_power_is_no_sensitivity_to_the_bit(method):
    one, other = network("llama").float(), network("llama").float()
    options = {"method": method, "sparsity": 0.6}
    alps_exp.prune_model(one, tokens(), sensitivity=SensitivityChoice("outputs", 4, 0.0), **options)
    alps_exp.prune_model(other, tokens(), **options)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("method", "sparsity"), [("wanda", "0.6"), ("alps", "2:4"), ("dsnot", "0.5")])
def test_rows_change_nothing_where_scores_do_not_compete_over_them(method, sparsity):
    one, other = network("llama").float(), network("llama").float()
    alps_exp.prune_model(one, tokens(), method, sparsity, sensitivity=SensitivityChoice("outputs", 4, 1.0))
    alps_exp.prune_model(other, tokens(), method, sparsity)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


@pytest.mark.slow
def test_a_trained_model_gains_perplexity(tiny_opt):
    encoder = AutoTokenizer.from_pretrained(tiny_opt)
    text = encoder(" ".join(documents(200, seed=5)), return_tensors="pt").input_ids[0]
    ids, held_out = text[: 48 * 64].view(48, 64), text[-40 * 64 :].view(40, 64)
    found = []
    for weighed in ({}, {"sensitivity": "outputs", "allocation": "sensitivity"}):
        model = AutoModelForCausalLM.from_pretrained(tiny_opt).eval()
        alps_exp.prune_model(model, ids, "magnitude", 0.7, batch_size=8, **weighed)
        found.append(perplexity(BlockModel(model, torch.device("cpu")), held_out, 8, quiet=True))
    assert found[1] < 0.98 * found[0], found


def test_kept_weights_that_a_method_does_not_change_stay_the_dense_ones_to_the_bit():
    model = network("llama").float()
    dense = {name: weight.clone() for name, weight in model.state_dict().items()}
    alps_exp.prune_model(model, tokens(), "magnitude", 0.6, sensitivity=SensitivityChoice("outputs", 4, 0.7))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, torch.where(weight == 0, 0, dense[name])), name


def test_rows_and_allocation_spare_what_the_loss_depends_on(tiny_llama):
    ids = random_tokens(16, 48)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    record = alps_exp.prune_model(
        model, ids, "magnitude", 0.6, sensitivity="outputs", allocation=BySensitivity(cap=0.2), batch_size=4
    )
    levels = [row["sparsity_target"] for row in record["layers"]]
    assert max(levels) > 0.65 and min(levels) < 0.55 and min(levels) >= 0.4 - 1e-3 and max(levels) <= 0.8 + 1e-3
    weights = sum(row["shape"][0] * row["shape"][1] for row in record["layers"])
    zeros = sum(round(row["sparsity"] * row["shape"][0] * row["shape"][1]) for row in record["layers"])
    assert zeros == weights - round(0.4 * weights), "the mean is exact to a weight"
    assert record["config"]["allocation"] == {"cap": 0.2, "name": "bysensitivity"}


@pytest.mark.parametrize("bound", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_levels_keep_the_mean_to_a_weight_and_stay_within_bounds(seed, bound):
    generator = torch.Generator().manual_seed(seed)
    sizes = {f"l{i}": int(torch.randint(5, 3000, (), generator=generator)) for i in range(9)}
    raw = {name: float(torch.rand((), generator=generator)) for name in sizes}
    found = exact_levels(raw, sizes, 0.7, bound)
    total = sum(sizes.values())
    assert sum(n - round((1 - found[name]) * n) for name, n in sizes.items()) == total - round((1 - 0.7) * total)
    assert all(abs(level - 0.7) <= bound + 1 / sizes[name] and 0 < level < 1 for name, level in found.items())


def test_layers_with_a_sparsity_of_their_own_keep_it():
    patterns = {f"m.layers.{i}.fc": parse_sparsity(0.5) for i in range(4)} | {"m.layers.0.q": parse_sparsity("2:4")}
    sizes = dict.fromkeys(patterns, 1000)
    found = Progression(step=0.1).allocate(patterns, sizes, Sensitivity())
    assert str(found["m.layers.0.q"]) == "2:4"
    levels = [found[f"m.layers.{i}.fc"].level for i in range(4)]
    assert levels == pytest.approx([0.35, 0.45, 0.55, 0.65])
    assert Uniform().allocate(patterns, sizes, Sensitivity()) is patterns


@pytest.mark.parametrize("target", [0.05, 0.5])
def test_levels_far_apart_keep_the_mean_too(target):
    sizes = {f"a.{i}.x": 49 * (1 + i % 3) for i in range(12)}  # of which 1/49 · 49 is less than 1 in binary
    found = exact_levels({name: target + 0.8 * i for i, name in enumerate(sizes)}, sizes, target, 1.0)
    total = sum(sizes.values())
    assert sum(n - round((1 - found[name]) * n) for name, n in sizes.items()) == total - round((1 - target) * total)
    assert all(0 < level < 1 for level in found.values())


def test_an_allocation_divides_the_sparsity_of_the_run_though_more_layers_have_one_of_their_own(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    options = {"allocation": Progression(step=0.2), "layer_sparsity": {"*.self_attn.*": 0.3}, "losses": False}
    record = alps_exp.prune_model(model, torch.zeros(1, 4).long(), "magnitude", 0.7, **options)
    rows = {row["name"]: row for row in record["layers"]}
    assert {row["sparsity_target"] for name, row in rows.items() if "self_attn" in name} == {0.3}
    for block, level in enumerate((0.6, 0.8)):
        assert rows[f"model.layers.{block}.mlp.up_proj"]["sparsity_target"] == pytest.approx(level, abs=1e-3)


def test_levels_from_a_file_or_another_run(tmp_path):
    sizes = {"a.0.x": 100, "a.1.x": 300}
    plain, record = tmp_path / "levels.json", tmp_path / "record.json"
    plain.write_text(json.dumps({"a.0.x": 0.2, "a.1.x": 0.6}))
    rows = [{"name": "a.0.x", "sparsity_target": 0.2}, {"name": "a.1.x", "sparsity_target": 0.6}]
    record.write_text(json.dumps({"layers": rows}))
    patterns = dict.fromkeys(sizes, parse_sparsity(0.5))
    for file in (plain, record):
        found = FromFile(str(file)).allocate(patterns, sizes, Sensitivity())
        assert [pattern.level for pattern in found.values()] == [0.2, 0.6]
    with pytest.raises(UserError, match=r"mean of 0\.5000, and sparsity=0\.7 is asked"):
        FromFile(str(plain)).allocate(dict.fromkeys(sizes, parse_sparsity(0.7)), sizes, Sensitivity())
    plain.write_text('{"a.0.x": 0.2}')
    with pytest.raises(UserError, match=r"gives a\.1\.x no fraction"):
        FromFile(str(plain)).allocate(patterns, sizes, Sensitivity())
    plain.write_text("[")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        FromFile(str(plain)).allocate(patterns, sizes, Sensitivity())


@pytest.mark.slow
def test_a_file_of_levels_is_looked_at_before_the_run_and_counts_as_an_input(tiny, tmp_path, monkeypatch):
    from alps_exp.cli.overrides import compose
    from alps_exp.runs.provenance import inputs_of
    from alps_exp.runs.settings import resolve

    words = [*tiny, "method=magnitude", "sparsity=0.5", "allocation=file"]
    with pytest.raises(UserError, match=r"allocation\.path"):
        resolve(compose([*words, f"allocation.path={tmp_path}/none.json"]))
    file = tmp_path / "levels.json"
    file.write_text("{}")
    with pytest.raises(UserError, match=r"gives .* no fraction of zeros"):
        resolve(compose([*words, f"allocation.path={file}"]))
    names = resolve(compose([*tiny, "method=magnitude", "sparsity=0.5"])).shapes
    file.write_text(json.dumps(dict.fromkeys(names, 0.5)))
    settings = resolve(compose([*words, f"allocation.path={file}"]))
    monkeypatch.chdir(tmp_path)
    same = resolve(compose([*words, "allocation.path=levels.json"]))
    assert same.configuration.digest == settings.configuration.digest
    before = inputs_of(settings)
    file.write_text(json.dumps(dict.fromkeys(names, 0.5), indent=1))
    assert inputs_of(settings) != before


WORDS = ["method=sparsegpt", "sparsity=0.6", "nsamples=6", "target=stream", "sensitivity=outputs"]
WORDS += ["sensitivity.windows=3", "allocation=sensitivity", "data.holdout=2"]


@pytest.fixture
def words(tiny) -> list[str]:
    return [word for word in tiny if not word.startswith("nsamples")] + WORDS


@pytest.mark.slow
def test_a_run_records_all_of_it_and_streams_to_the_same_bits(words, tmp_path):
    one = execute(words, tmp_path / "one", "stream=false", "save=true")
    other = execute(words, tmp_path / "other", "stream=true", "save=true")
    assert len(one["drift"]) == 2 and set(one["drift"][0]) == {"calibration", "held out"}
    assert one["phases"]["weigh_seconds"] > 0
    assert {row["target"] for row in one["layers"]} == {"layer", "stream"}
    assert len({row["sparsity_target"] for row in one["layers"]}) > 3
    for key in ("relative_loss", "sparsity_target", "target_loss", "held_out_loss"):
        assert [row[key] for row in one["layers"]] == [row[key] for row in other["layers"]]
    assert one["drift"] == other["drift"]


@pytest.mark.slow
def test_an_allocation_leaves_n_of_m_as_asked_and_says_so(words, tmp_path, monkeypatch):
    from alps_exp.procedure import weighing

    monkeypatch.setattr(weighing, "measure_sensitivity", lambda *_, **__: pytest.fail("nothing reads it"))
    record = execute([word for word in words if word != "sparsity=0.6"], tmp_path, "sparsity=2:4")
    assert {row["pattern"] for row in record["layers"]} == {"2:4"} and "weigh_seconds" not in record["phases"]
    assert any("no backward pass was made" in line for line in record["warnings"])
    assert any("leaves 2:4 as it was asked for" in line for line in record["warnings"])


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["true", "false"])
def test_an_interrupted_run_goes_on_to_the_same_bits_without_another_backward_pass(
    words, tmp_path, monkeypatch, stream
):
    from alps_exp.procedure import weighing
    from alps_exp.pruning import stages

    whole = execute(words, tmp_path / "whole", f"stream={stream}", "save=true")
    with interrupted(stages, "solve_layers", 6):
        execute(words, tmp_path / "run", f"stream={stream}", "save=true")
    with monkeypatch.context() as patch:
        patch.setattr(weighing, "measure_sensitivity", lambda *_, **__: pytest.fail("measured again"))
        again = execute(words, tmp_path / "run", f"stream={stream}", "save=true")
    assert again["attempts"] == 2 and again["drift"] == whole["drift"]
    assert [row["relative_loss"] for row in again["layers"]] == [row["relative_loss"] for row in whole["layers"]]
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["propagate=dense"], "target=stream makes up for"),
        (["sensitivity=none", "~sensitivity.windows"], "needs gradients of the dense model"),
        (["sensitivity.windows=7"], "more than the calibration windows"),
        (["statistics_cache=1"], "collects it behind pruned layers"),
        (["allocation=file"], "needs allocation.path"),
        (["capture=order"], "capture='order' is not allowed"),
        (["sensitivity.rows=-1"], "sensitivity.rows"),
        (["allocation.cap=2"], "allocation.cap"),
        (["target.strength=2"], "target.strength"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_runs(words, tmp_path, more, message):
    from alps_exp.cli.overrides import compose
    from alps_exp.runs.settings import resolve

    with pytest.raises(UserError, match=message) as error:
        dropped = [word.removeprefix("~") for word in more if word.startswith("~")]
        kept = [word for word in words if word.partition("=")[0] not in dropped]
        resolve(compose([*kept, *(word for word in more if not word.startswith("~"))]))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_choices_that_say_nothing_change_no_hash(tiny):
    from alps_exp.cli.overrides import compose
    from alps_exp.runs.naming import config_hash

    plain = config_hash(compose(tiny))
    nothing = ["target=layer", "sensitivity=none", "allocation=uniform", "capture=auto"]
    assert config_hash(compose([*tiny, *nothing])) == plain
    for word in ("target=stream", "sensitivity=outputs", "allocation=atp", "capture=groups"):
        assert config_hash(compose([*tiny, word])) != plain, word
    one, other = (config_hash(compose([*tiny, "target=stream", f"target.strength={v}"])) for v in ("1", "1.0"))
    assert one == other
