"""Targets: the stream target against plain least squares in float64, layer by layer and over whole blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import CONFIGS, network, random_tokens, tokens
from torch import nn
from transformers import AutoModelForCausalLM

import alps_exp
from alps_exp.allocation.prunable import linear_shapes
from alps_exp.allocation.selection import Selection
from alps_exp.base.errors import UserError
from alps_exp.layer.inputs import Inputs
from alps_exp.layer.problem import LayerProblem
from alps_exp.layer.registry import solver
from alps_exp.methods.target import LayerTarget, StreamTarget, Target
from alps_exp.model.blocks import BlockModel
from alps_exp.model.layers import Layer
from alps_exp.model.residual import Additions
from alps_exp.model.structure import block_layers, find_blocks
from alps_exp.patterns import parse_sparsity
from alps_exp.procedure.prune import prune_blocks
from alps_exp.pruning.job import PruneJob
from alps_exp.pruning.rows import PruneResult

CPU = torch.device("cpu")
# Name of attention's and of the MLP's writer, and of what each is normed by on its way to the stream.
WRITERS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "granite": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma3": ("self_attn.o_proj", "mlp.down_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "opt-350m": ("self_attn.out_proj", "fc2"),
    "gpt-neox": ("attention.dense", "mlp.dense_4h_to_h"),
}


def prune(model: nn.Module, target: Target, method: str = "magnitude", sparsity: str = "0.5", **options) -> PruneResult:
    selection = Selection()
    patterns = selection.patterns_for(linear_shapes(model, selection), parse_sparsity(sparsity))
    options = {"tokens": tokens(), "batch_size": 5, "quiet": True, **options}
    job = PruneJob(solver(method), patterns, selection, target=target, **options)
    return prune_blocks(BlockModel(model, CPU), job)


class Record:
    """What every module of a block has received and given in a forward of the whole model, by name."""

    def __init__(self, model: nn.Module, prefix: str) -> None:
        self.received: dict[str, torch.Tensor] = {}
        self.given: dict[str, torch.Tensor] = {}
        block, handles = model.get_submodule(prefix), []
        for name, module in block.named_modules():
            handles.append(module.register_forward_hook(self._keep(name), with_kwargs=True))
        with torch.no_grad():
            model(tokens(), use_cache=False)
        for handle in handles:
            handle.remove()

    def _keep(self, name: str):
        def hook(module, args, kwargs, output) -> None:
            found = args[0] if args else kwargs.get("hidden_states")
            if isinstance(found, torch.Tensor):
                self.received[name] = found.clone().reshape(12, 24, -1)
            if isinstance(output, tuple):
                output = output[0]
            if isinstance(output, torch.Tensor):
                self.given[name] = output.clone().reshape(12, 24, -1)

        return hook


def stream(family: str, record: Record, second: bool) -> torch.Tensor:
    """What the attention's, or the MLP's, output is added to."""
    hidden, attention = record.received[""], record.given[WRITERS[family][0]]
    if not second:
        return hidden
    if family == "granite":
        return hidden + 0.4 * attention
    if family == "gemma3":
        return hidden + record.given["post_attention_layernorm"]
    if family == "opt-350m":
        return record.given["self_attn_layer_norm"]
    return hidden + attention


def factor(family: str, record: Record, second: bool) -> torch.Tensor | float:
    if family == "granite":
        return 0.4
    if family == "gemma3":
        norm = "post_feedforward_layernorm" if second else "post_attention_layernorm"
        return record.given[norm] / record.received[norm]
    return 1.0


def plain_loop(family: str, model: nn.Module, strength: float, ridge: float, sparsity: float) -> None:
    """Magnitude pruning in place to the stream target, by whole forwards and least squares with a ridge."""
    dense = copy.deepcopy(model)
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        name = f"{prefix}.{index}"
        linears = block_layers(block, name)
        shared: dict[int, list[str]] = {}
        for full in linears:  # q, k, v, then their writer, then the MLP
            local = full.removeprefix(f"{name}.")
            place = 1 if local == WRITERS[family][0] else 3 if local == WRITERS[family][1] else None
            if place is None:
                place = 0 if "attn" in local or "attention" in local else 2
            shared.setdefault(place, []).append(local)
        for place in sorted(shared):
            pruned_record, dense_record = Record(model, name), Record(dense, name)
            for local in shared[place]:
                layer = Layer(local, block.get_submodule(local))
                weight = layer.weight.clone()
                if place in (1, 3) and strength:
                    second = place == 3
                    x, other = pruned_record.received[local], dense_record.received[local]
                    error = stream(family, dense_record, second) - stream(family, pruned_record, second)
                    through = factor(family, pruned_record, second)
                    if isinstance(through, torch.Tensor):  # outputs of which little passes are asked for less
                        error = error / (through + through.abs().mean(-1, keepdim=True) ** 2 / through)
                    else:
                        error = error / through
                    r = (other - x) @ weight.T + error
                    flat, wanted = x.reshape(-1, x.shape[-1]), r.reshape(-1, r.shape[-1])
                    root = (ridge * flat.square().sum(0).mean()).sqrt()
                    rows = torch.cat([flat, root * torch.eye(flat.shape[1], dtype=flat.dtype)])
                    right = torch.cat([wanted, torch.zeros(flat.shape[1], wanted.shape[1], dtype=flat.dtype)])
                    weight = weight + strength * torch.linalg.lstsq(rows, right).solution.T
                order = weight.abs().flatten().argsort(descending=True)
                mask = torch.zeros(weight.numel(), dtype=torch.bool)
                mask[order[: round((1 - sparsity) * weight.numel())]] = True
                layer.write(weight * mask.view_as(weight))


def difference(one: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        a, b = one(tokens(), use_cache=False).logits, other(tokens(), use_cache=False).logits
    return float((a - b).norm() / b.norm())


def spread(model: nn.Module) -> nn.Module:
    """Norms behind the writers that let some outputs through a hundred times less than others, as Gemma 3's do."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            powers = 2 * torch.rand(value.shape, generator=generator, dtype=value.dtype) - 2
            value.data = 10**powers - 1
    return model


@pytest.mark.parametrize(("method", "sparsity"), [("magnitude", "0.5"), ("sparsegpt", "2:4")])
def test_outputs_that_a_norm_holds_back_do_not_drown_the_others(method, sparsity):
    dense, found = spread(network("gemma3")), []
    for target in (LayerTarget(), StreamTarget()):
        model = spread(network("gemma3"))
        prune(model, target, method, sparsity)
        found.append(difference(model, dense))
    assert found[1] < 0.85 * found[0], found


@pytest.mark.parametrize("family", CONFIGS)
def test_blocks_are_fitted_as_by_a_plain_loop(family):
    model, expected = network(family), network(family)
    result = prune(model, StreamTarget(0.5, 0.01))
    plain_loop(family, expected, 0.5, 0.01, 0.5)
    for row in result.layers:
        one, other = model.get_submodule(row.name).weight, expected.get_submodule(row.name).weight
        # The loop computes targets in float32, so that a few weights at the threshold change places.
        same = ((one != 0) == (other != 0)).double().mean()
        assert same > 0.995, (row.name, float(same))
        kept = (one != 0) & (other != 0)
        assert float((one - other)[kept].norm() / other[kept].norm()) < 5e-3, row.name
    assert difference(model, expected) < 0.03
    layer = network(family)
    prune(layer, LayerTarget(), capture="groups")
    assert difference(model, layer) > 0.05, "the target must have changed something"
    fitted = {row.name.removeprefix(f"{row.name.split('.')[0]}.") for row in result.layers if row.target == "stream"}
    assert all(any(name.endswith(writer) for name in fitted) for writer in WRITERS[family])
    assert len(fitted) == 4


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_layers_captured_in_order_are_those_of_a_plain_loop(family):
    model, expected = network(family), network(family)
    prune(model, LayerTarget(), capture="groups", method="wanda")
    reference = network(family)
    prune(reference, LayerTarget(), method="wanda")
    plain_loop(family, expected, 0.0, 0.01, 0.5)
    magnitude = network(family)
    prune(magnitude, LayerTarget(), capture="groups")
    assert difference(magnitude, expected) < 1e-6
    assert difference(model, reference) > 1e-3, "what a layer is fed must have been pruned before"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", [8, 40])
def test_the_target_is_a_ridge_regression(seed, width):
    generator = torch.Generator().manual_seed(seed)
    x, wanted = (torch.randn(60, n, generator=generator, dtype=torch.float64) for n in (width, 12))
    x = x @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    x[:, 2] = 0
    weight = torch.randn(12, width, generator=generator, dtype=torch.float64)
    problem = LayerProblem(weight, Inputs(gram=x.T @ x, correction=wanted.T @ x))
    posed = StreamTarget(0.7, 0.02).posed(problem)
    root = (0.02 * x.square().sum(0).mean()).sqrt()
    rows = torch.cat([x, root * torch.eye(width, dtype=torch.float64)])
    right = torch.cat([wanted, torch.zeros(width, 12, dtype=torch.float64)])
    expected = weight + 0.7 * torch.linalg.lstsq(rows, right).solution.T
    torch.testing.assert_close(posed.weight, expected, rtol=1e-8, atol=1e-8)
    assert torch.equal(posed.weight[:, 2], weight[:, 2]), "a dead input asks for nothing"
    assert torch.equal(problem.weight, weight)


@pytest.mark.parametrize("capture", ["block", "groups"])
@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_no_strength_is_the_layer_target_to_the_bit(capture, method):
    one, other = network("llama").float(), network("llama").float()
    results = [
        prune(model, target, method, capture=capture)
        for model, target in ((one, StreamTarget(0.0)), (other, LayerTarget()))
    ]
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    assert results[0].layers[3].relative_loss == results[1].layers[3].relative_loss
    assert not results[0].drift


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_pruned_by_nothing_is_the_dense_one(family):
    model, dense = network(family).float(), network(family).float()
    result = prune(model, StreamTarget(1.0), "sparsegpt", "1e-6")
    assert difference(model, dense) < 1e-5
    assert all(drift["calibration"]["mean"] < 1e-9 for drift in result.drift)


def test_drift_is_that_of_the_hidden_states():
    model, dense = network("llama"), network("llama")
    result = prune(model, StreamTarget(), held_out=tokens(3))
    prefix, _ = find_blocks(model)
    for index, found in enumerate(result.drift):
        one, other = (Record(each, f"{prefix}.{index}").given[""] for each in (model, dense))
        errors = (one - other).square().sum(-1) / other.square().sum(-1)
        assert found["calibration"]["mean"] == pytest.approx(float(errors[:, 1:].mean()), rel=1e-4)
        assert found["calibration"]["median"] == pytest.approx(float(errors[:, 1:].median()), rel=1e-4)
        assert found["calibration"]["first"] == pytest.approx(float(errors[:, 0].mean()), rel=1e-4)
        assert found["held out"]["mean"] == pytest.approx(float(errors[:3, 1:].mean()), rel=0.5)
    assert len(result.drift) == 2


def test_rows_tell_what_was_fitted_and_how_well():
    result = prune(network("llama"), StreamTarget(), method="sparsegpt")
    for row in result.layers:
        assert (row.target_loss is not None) == (row.target == "stream")
        assert 0 < row.relative_loss < 1 and (row.target_loss is None or 0 < row.target_loss < 1)


@pytest.mark.parametrize(("glob", "told"), [("*q_proj", True), ("*o_proj", False)])
def test_a_target_without_writers_to_fit_is_told(glob, told):
    options = {"target": "stream", "include": [glob]}
    record = alps_exp.prune_model(network("llama").float(), tokens(2), "wanda", 0.5, **options)
    assert any("none was fitted to the stream" in note for note in record["warnings"]) == told


@pytest.mark.slow
def test_a_trained_model_gains_perplexity(tiny_opt):
    from alps_exp.evaluation.perplexity import perplexity

    ids = random_tokens(24, 48)
    from tiny_models import documents
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(tiny_opt)(" ".join(documents(200, seed=5)), return_tensors="pt").input_ids[0]
    ids, held_out = text[: 48 * 64].view(48, 64), text[-40 * 64 :].view(40, 64)
    found = {}
    for name, target in (("layer", LayerTarget()), ("stream", StreamTarget())):
        model = AutoModelForCausalLM.from_pretrained(tiny_opt).eval()
        prune(model, target, "sparsegpt", "0.7", tokens=ids, batch_size=8)
        found[name] = perplexity(BlockModel(model, CPU), held_out, 8, quiet=True)
    assert found["stream"] < 0.97 * found["layer"], found


class Alone(nn.Module):
    """A block whose layers add nothing to what they are given."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states, **rest):
        return self.block.mlp(hidden_states)


def test_a_block_without_writers_is_refused_by_name():
    model = network("llama").float()
    layers = model.model.layers
    for index in range(2):
        layers[index] = Alone(layers[index])
    selection = Selection.parse(exclude=["*self_attn*"])
    patterns = selection.patterns_for(linear_shapes(model, selection), parse_sparsity("0.5"), [])
    job = PruneJob(solver("wanda"), patterns, selection, tokens(), target=StreamTarget(), quiet=True)
    with pytest.raises(UserError, match=r"model\.layers\.0: no layer is seen to add its output.*target=layer"):
        prune_blocks(BlockModel(model, CPU), job)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": -0.1}, "target.strength"),
        ({"strength": 1.5}, "from 0 up to 1"),
        ({"strength": "Auto"}, "from 0 up to 1, or auto"),
        ({"ridge": 0.0}, "target.ridge"),
    ],
)
def test_values_that_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        StreamTarget(**fields)


@pytest.mark.parametrize("family", CONFIGS)
def test_writers_are_found_and_nothing_else(family):
    model = network(family)
    blocks = find_blocks(model)[1]
    linears = block_layers(blocks[0], "b")
    found = {}

    def watched(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        found["additions"] = Additions(module, linears, hidden)
        found["additions"].__enter__()

    def done(module, args, output):
        found["additions"].__exit__(None, None, None)

    handles = blocks[0].register_forward_pre_hook(watched, with_kwargs=True), blocks[0].register_forward_hook(done)
    with torch.no_grad():
        model(tokens(), use_cache=False)
    for handle in handles:
        handle.remove()
    assert {name.removeprefix("b.") for name in found["additions"].found} == set(WRITERS[family])


class Counting(Additions):
    """Counts what it watches."""

    def __init__(self, *args, **keys) -> None:
        super().__init__(*args, **keys)
        self.watched = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.watched += 1
        return super().__torch_dispatch__(function, types, args, kwargs)


@torch.no_grad()
def test_what_known_parts_do_is_not_watched():
    block = find_blocks(network("llama"))[1][0]
    linears = block_layers(block, "b")
    parts = {block.self_attn: "b.self_attn.o_proj", block.mlp: "b.mlp.down_proj"}
    hidden, rotary = torch.randn(2, 5, 32), (torch.ones(1, 5, 8), torch.zeros(1, 5, 8))
    with Counting(block, linears, hidden) as plain:
        expected = block(hidden, position_embeddings=rotary)
    with Counting(block, linears, hidden, parts=parts) as spared:
        assert torch.equal(block(hidden, position_embeddings=rotary), expected)
    assert spared.watched < plain.watched / 2
    assert spared.found.keys() == plain.found.keys() == set(parts.values())
    for name, addition in spared.found.items():
        assert torch.equal(addition.stream, plain.found[name].stream) and addition.factor == 1
    with (
        pytest.raises(TypeError),
        Counting(block, linears, hidden, parts=parts) as failed,
    ):
        try:
            block(hidden)  # its attention needs position embeddings
        finally:
            before = failed.watched
            hidden + 1
            assert failed.watched == before + 1
    hidden + 1
    assert failed.watched == before + 1
