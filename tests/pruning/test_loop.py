"""The block loop against a plain one: whole-model forwards, inputs kept, one `prune_layer` a layer."""

import copy
from threading import get_ident

import pytest
import torch
from tiny import load, random_tokens, words_for
from tiny import network as made
from torch import nn

import alps_exp
from alps_exp.base.errors import UserError
from alps_exp.base.fallbacks import fell_back
from alps_exp.baselines.magnitude import Magnitude
from alps_exp.cli.overrides import compose
from alps_exp.methods import recorded
from alps_exp.methods.target import StreamTarget
from alps_exp.model.blocks import BlockModel
from alps_exp.model.source import StreamedBlocks
from alps_exp.model.structure import block_layers, find_blocks
from alps_exp.runs import run as runs

FAMILIES = ["opt", "llama", "gpt2", "gemma3", "qwen3"]


def plain_loop(network: nn.Module, ids: torch.Tensor, method: str, sparsity: str, propagate: str) -> dict[str, float]:
    """Prune in place; returns each layer's relative loss in float64."""
    dense = copy.deepcopy(network)
    prefix, blocks = find_blocks(network)
    losses = {}
    for index, block in enumerate(blocks):
        linears = block_layers(block, f"{prefix}.{index}")
        inputs: dict[str, torch.Tensor] = {}
        source = dense if propagate == "dense" else network
        handles = [
            source.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name, kept=inputs: kept.__setitem__(name, args[0].detach().clone())
            )
            for name in linears
        ]
        with torch.no_grad():
            source(ids)
        for handle in handles:
            handle.remove()
        for name, layer in linears.items():
            weight = layer.weight.clone()
            x = inputs[name]
            solution = alps_exp.prune_layer(weight, inputs=x, method=method, sparsity=sparsity)
            layer.write(solution.weight)
            flat, delta = x.reshape(-1, x.shape[-1]).double(), weight.double() - solution.weight.double()
            losses[name] = float((flat @ delta.T).square().sum() / (flat @ weight.double().T).square().sum())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method", "sparsity"),
    [
        *((family, "sparsegpt", "2:4") for family in FAMILIES),
        *(("llama", method, "0.5") for method in ("wanda", "dsnot", "admm-grad")),
        ("opt", "dsnot", "0.6"),  # with biases, and inputs off zero
    ],
)
def test_weights_and_losses_are_those_of_a_plain_loop(request, family, method, sparsity):
    folder, ids = request.getfixturevalue(f"tiny_{family}"), random_tokens(6, 64)
    network, expected = load(folder), load(folder)
    record = alps_exp.prune_model(network, ids, method=method, sparsity=sparsity, batch_size=4)
    losses = plain_loop(expected, ids, method, sparsity, "pruned")
    assert [row["name"] for row in record["layers"]] == list(losses)
    for row in record["layers"]:
        # Rounding may swap nearly equal scores, which moves a loss a little and a model's output hardly.
        assert row["relative_loss"] == pytest.approx(losses[row["name"]], rel=0.05), row["name"]
    with torch.no_grad():
        one, other = network(ids).logits, expected(ids).logits
    assert float((one - other).norm() / other.norm()) < 0.02


@pytest.mark.slow
def test_alps_losses_are_those_of_a_plain_loop(tiny_llama):
    # ADMM turns rounding into other supports of equal quality, so only the losses can agree.
    ids, network = random_tokens(6, 64), load(tiny_llama)
    record = alps_exp.prune_model(network, ids, sparsity=0.6, batch_size=4)
    losses = plain_loop(load(tiny_llama), ids, "alps", "0.6", "pruned")
    assert record["summary"]["mean_relative_loss"] == pytest.approx(sum(losses.values()) / len(losses), rel=0.03)


@pytest.mark.slow
def test_dense_propagation_calibrates_on_the_dense_model(tiny_llama):
    ids, network, expected = random_tokens(6, 64), load(tiny_llama), load(tiny_llama)
    record = alps_exp.prune_model(network, ids, method="sparsegpt", sparsity=0.5, propagate="dense")
    losses = plain_loop(expected, ids, "sparsegpt", "0.5", "dense")
    for row in record["layers"]:
        assert row["relative_loss"] == pytest.approx(losses[row["name"]], rel=0.02), row["name"]
    pruned = plain_loop(load(tiny_llama), ids, "sparsegpt", "0.5", "pruned")
    assert any(abs(pruned[name] / loss - 1) > 0.05 for name, loss in losses.items())


@pytest.mark.slow
def test_the_same_call_gives_the_same_weights(tiny_opt):
    one, other = load(tiny_opt), load(tiny_opt)
    for network in (one, other):
        alps_exp.prune_model(network, random_tokens(6, 64), sparsity=0.6)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


def test_only_linear_layers_of_blocks_change(tiny_llama):
    network, before = load(tiny_llama), load(tiny_llama).state_dict()
    record = alps_exp.prune_model(network, random_tokens(6, 64), method="magnitude", sparsity=0.5)
    pruned = {f"{row['name']}.weight" for row in record["layers"]}
    assert len(pruned) == 14
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, before[name]) == (name not in pruned), name


def test_tied_head_stays_tied_and_untouched(tiny_gemma3):
    network = load(tiny_gemma3)
    before = network.lm_head.weight.clone()
    alps_exp.prune_model(network, random_tokens(6, 64), method="wanda", sparsity=0.5)
    assert network.lm_head.weight is network.get_input_embeddings().weight
    assert torch.equal(network.lm_head.weight, before)


@pytest.mark.slow
def test_half_precision_model_keeps_its_dtype(tiny_llama):
    network = load(tiny_llama).to(torch.bfloat16)
    record = alps_exp.prune_model(network, random_tokens(6, 64), sparsity=0.5)
    assert network.dtype == torch.bfloat16
    assert all(row["sparsity"] == pytest.approx(0.5, abs=1e-3) for row in record["layers"])
    reference = alps_exp.prune_model(load(tiny_llama), random_tokens(6, 64), sparsity=0.5)
    assert record["summary"]["mean_relative_loss"] == pytest.approx(reference["summary"]["mean_relative_loss"], rel=0.1)


def test_layers_by_pattern(tiny_llama):
    network = load(tiny_llama)
    record = alps_exp.prune_model(
        network,
        random_tokens(6, 64),
        method="wanda",
        sparsity=0.5,
        exclude=["layers.0.*"],
        layer_sparsity={"mlp.*": "2:4"},
    )
    assert all(row["block"] == 1 for row in record["layers"])
    patterns = {row["name"].split(".")[-1]: row["pattern"] for row in record["layers"]}
    assert patterns["q_proj"] == "0.5" and patterns["down_proj"] == "2:4"
    selections = {row["name"].split(".")[-1]: row["selection"] for row in record["layers"]}
    assert selections["q_proj"] == "row" and selections["down_proj"] == "group of 4"
    first = network.model.layers[0].mlp.down_proj.weight
    assert first.count_nonzero() == first.numel()


def test_magnitude_without_losses_needs_no_forward(tiny_llama, monkeypatch):
    network = load(tiny_llama)
    monkeypatch.setattr(network.model, "forward", lambda *args, **kwargs: pytest.fail("a forward pass ran"))
    record = alps_exp.prune_model(network, random_tokens(6, 64), method="magnitude", sparsity=0.5, losses=False)
    assert record["summary"]["mean_relative_loss"] is None
    assert record["summary"]["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_wanda_without_losses_collects_no_matrix(tiny_llama):
    with_losses, without = load(tiny_llama), load(tiny_llama)
    alps_exp.prune_model(with_losses, random_tokens(6, 64), method="wanda", sparsity=0.5)
    record = alps_exp.prune_model(without, random_tokens(6, 64), method="wanda", sparsity=0.5, losses=False)
    assert all(row["relative_loss"] is None for row in record["layers"])
    one, other = with_losses.state_dict(), without.state_dict()
    equal = [float(((one[name] == 0) == (other[name] == 0)).float().mean()) for name in one]
    assert min(equal) > 0.999


def test_dense_changes_nothing(tiny_llama):
    network, before = load(tiny_llama), load(tiny_llama).state_dict()
    record = alps_exp.prune_model(network, random_tokens(6, 64), method="dense")
    assert record["layers"] == [] and record["sparsity"] == "0"
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())


@pytest.mark.slow
def test_dead_inputs_and_few_tokens_are_counted_and_named(tiny_llama):
    network = load(tiny_llama)
    network.model.layers[0].post_attention_layernorm.weight.data[:3] = 0
    record = alps_exp.prune_model(network, random_tokens(1, 16), sparsity=0.5)
    rows = {row["name"]: row for row in record["layers"]}
    assert rows["model.layers.0.mlp.up_proj"]["dead_inputs"] == 3
    assert len(record["warnings"]) == 2
    assert (network.model.layers[0].mlp.up_proj.weight[:, :3] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_name_the_layer(tiny_llama, value):
    network = load(tiny_llama)
    network.model.layers[1].self_attn.k_proj.weight.data[1, 2] = value
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.k_proj: the weight has 1 NaN"):
        alps_exp.prune_model(network, random_tokens(6, 64), method="magnitude", sparsity=0.5, losses=False)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, dtype=torch.long), "windows, seqlen"),
        (torch.zeros(2, 8), "integer tensor"),
        (torch.full((2, 8), 384), "from 0 to 383"),
        (torch.full((2, 8), -1), "from 0 to 383"),
    ],
)
def test_bad_tokens(tiny_llama, ids, message):
    with pytest.raises(UserError, match=message):
        alps_exp.prune_model(load(tiny_llama), ids)


def test_a_width_that_the_pattern_does_not_fit_is_named_before_work(tiny_llama):
    network = load(tiny_llama)
    with pytest.raises(UserError, match=r"sparsity 1:3 does not fit model\.layers\.0\.self_attn\.q_proj"):
        alps_exp.prune_model(network, random_tokens(6, 64), sparsity="1:3")


def trace_blocks(monkeypatch, ran: list[int]) -> None:
    """Note the index of every block that is run."""
    original = BlockModel.forward_block

    def forward(self, index, block, hidden):
        ran.append(index)
        return original(self, index, block, hidden)

    monkeypatch.setattr(BlockModel, "forward_block", forward)


@pytest.mark.slow
@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_blocks_behind_the_last_pruned_one_are_not_run(tiny_gemma3, monkeypatch, propagate):
    options = {"method": "sparsegpt", "sparsity": 0.5, "propagate": propagate}
    whole, part, ran = load(tiny_gemma3), load(tiny_gemma3), []
    everything = alps_exp.prune_model(whole, random_tokens(6, 64), **options)
    trace_blocks(monkeypatch, ran)
    include = ["layers.0.self_attn.k_proj", "layers.1.mlp.up_proj"]
    record = alps_exp.prune_model(part, random_tokens(6, 64), **options, include=["layers.0.*", "layers.1.mlp.up_proj"])
    assert set(ran) == {0, 1}
    losses = {row["name"]: row["relative_loss"] for row in everything["layers"]}
    assert all(row["relative_loss"] == losses[row["name"]] for row in record["layers"])
    for name in include:
        name = f"model.{name}"
        assert torch.equal(part.get_submodule(name).weight, whole.get_submodule(name).weight), name
    dense = load(tiny_gemma3).state_dict()
    kept = [name for name in dense if ".layers.2." in name]
    assert kept and all(torch.equal(part.state_dict()[name], dense[name]) for name in kept)


def test_a_single_layer_takes_one_forward_of_one_block(tiny_gemma3, monkeypatch):
    ran = []
    trace_blocks(monkeypatch, ran)
    record = alps_exp.prune_model(
        load(tiny_gemma3), random_tokens(6, 64), sparsity=0.5, include=["layers.0.self_attn.k_proj"]
    )
    assert [row["name"] for row in record["layers"]] == ["model.layers.0.self_attn.k_proj"]
    assert ran == [0] * (2 + len(random_tokens(6, 64)))  # two windows before, to see that the loop is faithful


@pytest.mark.slow
def test_what_is_not_pruned_is_not_read_from_the_files_and_saved_as_it_is(
    tiny_gemma3, text_file, tmp_path, monkeypatch
):
    words = words_for(tiny_gemma3, text_file, "nsamples=3")
    words += ["seqlen=48", "eval=none", "method=wanda", "layers.include=[layers.0.*]"]
    read, original = [], StreamedBlocks._read
    with monkeypatch.context() as patch:
        patch.setattr(StreamedBlocks, "_read", lambda self, *rest: [read.append(rest[0]), original(self, *rest)][1])
        streamed = runs.run(compose([*words, "stream=true"]), tmp_path / "streamed")
    assert set(read) == {0}
    saved = runs.run(compose([*words, "stream=true", "save=true"]), tmp_path / "saved")
    evaluated = ["stream=false", "eval=perplexity", "eval.windows=2", "eval.sample_tokens=0"]
    kept = runs.run(compose([*words, "save=true", *evaluated]), tmp_path / "kept")
    losses = [[row["relative_loss"] for row in record["layers"]] for record in (streamed, saved, kept)]
    assert losses[0] == losses[1] == losses[2]
    one, other = (load(tmp_path / name / "model").state_dict() for name in ("saved", "kept"))
    dense = load(tiny_gemma3).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert all(torch.equal(one[name], dense[name]) == (".layers.0." not in name) for name in dense if "_proj" in name)


@pytest.mark.parametrize("options", [{"capture": "groups"}, {"capture": "groups", "target": StreamTarget(0.0)}])
def test_where_nothing_is_captured_there_is_no_order(options):
    one, other = made("llama").float(), made("llama").float()
    alps_exp.prune_model(one, random_tokens(2, 8) % 90, "magnitude", 0.5, losses=False, **options)
    alps_exp.prune_model(other, random_tokens(2, 8) % 90, "magnitude", 0.5, losses=False)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:a plainer way")
def test_the_record_tells_of_plainer_ways_of_its_own_run_and_recordings_end_with_it(monkeypatch):
    solve, key = Magnitude._solve, (get_ident(), "a shape")

    def plainer(self, problem, pattern):
        fell_back("a plainer way")
        recorded._seen[key] = None
        return solve(self, problem, pattern)

    monkeypatch.setattr(Magnitude, "_solve", plainer)
    told = alps_exp.prune_model(made("llama"), random_tokens(2, 64) % 90, method="magnitude")["warnings"]
    assert told.count("a plainer way") == 1 and key not in recorded._seen
    fell_back("a plainer way")  # before the run, by something else
    monkeypatch.setattr(Magnitude, "_solve", solve)
    assert (
        "a plainer way"
        not in alps_exp.prune_model(made("llama"), random_tokens(2, 64) % 90, method="magnitude")["warnings"]
    )
