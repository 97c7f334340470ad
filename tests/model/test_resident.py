"""Models whose linear layers stay packed: the same results, less memory, no gradients."""

from copy import deepcopy

import pytest
import torch
from tiny import network, tokens
from torch import nn

from alps_exp.base.errors import UserError
from alps_exp.model.resident import PackedLinear, RowsLinear, _join, make_resident, nbytes, resident_as
from alps_exp.numerics import gap_codes
from alps_exp.numerics.gap_codes import encode

CPU = torch.device("cpu")


def pruned(family: str = "llama", dtype=torch.float32) -> nn.Module:
    made = network(family).requires_grad_(False)
    for name, parameter in made.named_parameters():
        if "proj" in name and parameter.ndim == 2:
            parameter.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.2)
    return made.to(dtype)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_packed_model_gives_the_dense_ones_logits_from_less_memory(family):
    dense = pruned(family)
    packed = deepcopy(dense)
    report = make_resident(packed, "packed", CPU)
    assert report.layers == tuple(n for n, m in dense.named_modules() if type(m) is nn.Linear and "proj" in n)
    assert report.bytes < 0.5 * report.dense_bytes
    assert nbytes(packed) == nbytes(dense) - report.dense_bytes + report.bytes
    ids = tokens(2)
    assert torch.allclose(packed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    one, other = (m.generate(ids[:1, :5], max_new_tokens=6, do_sample=False) for m in (packed, dense))
    assert torch.equal(one, other)
    layer = packed.get_submodule(report.layers[0])
    assert torch.equal(layer.weight, dense.get_submodule(report.layers[0]).weight)


@pytest.mark.parametrize("kind", [RowsLinear, PackedLinear])
@pytest.mark.parametrize("bias", [True, False])
def test_layers(kind, bias):
    linear = nn.Linear(40, 24, bias=bias).requires_grad_(False)
    linear.weight[linear.weight.abs() < 0.1] = 0
    made = kind(linear, linear.weight if kind is RowsLinear else encode(linear.weight))
    for rows in (1, 3, 80):
        x = torch.randn(rows, 40)
        assert torch.allclose(made(x), linear(x), atol=1e-5)
    x = torch.randn(2, 3, 40)
    assert torch.allclose(made(x), linear(x), atol=1e-5)
    assert torch.equal(made.weight, linear.weight)
    assert "in_features=40" in repr(made)
    with pytest.raises(UserError, match="packed weights give no gradients"):
        made(x.requires_grad_())
    with torch.no_grad():
        made(x)


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """The outputs of every product from gap codes; on the CPU each decodes what it multiplies with."""
    made, plain = [], gap_codes.decode

    def counted(coded):
        made.append(coded.shape[0])
        return plain(coded)

    monkeypatch.setattr(gap_codes, "decode", counted)
    return made


def in_gap_codes(model: nn.Module) -> nn.Module:
    """The model with all that is pruned in gap codes, as on CUDA."""
    layers = {
        name: PackedLinear(layer, encode(layer.weight))
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and "proj" in name
    }
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
    _join(layers)
    return model


@torch.no_grad()
@pytest.mark.parametrize(("family", "made"), [("llama", [64, 32, 96, 32]), ("opt", [96, 32])])
def test_what_reads_the_same_input_is_one_product(family, made, products):
    dense = pruned(family)
    apart = nbytes(dense) - sum(
        m.weight.nbytes for n, m in dense.named_modules() if "proj" in n and hasattr(m, "weight")
    )
    packed = in_gap_codes(deepcopy(dense))
    copied = deepcopy(packed)
    for ids in (tokens(1)[:, :3], tokens(2)):
        for model in (packed, copied):
            products.clear()
            assert torch.allclose(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
            assert products == made * 2
    codes = sum(
        part.nbytes
        for name, layer in dense.named_modules()
        if "proj" in name and type(layer) is nn.Linear
        for part in vars(encode(layer.weight)).values()
        if isinstance(part, torch.Tensor)
    )
    assert nbytes(packed) < apart + codes
    for name, layer in dense.named_modules():
        if "proj" in name and type(layer) is nn.Linear:
            assert torch.equal(packed.get_submodule(name).weight, layer.weight)


@torch.no_grad()
def test_results_made_together_are_of_the_input_that_is_given(products):
    layers = [nn.Linear(40, rows).requires_grad_(False) for rows in (24, 8, 16)]
    packed = [PackedLinear(layer, encode(layer.weight)) for layer in layers]
    PackedLinear.join(packed)

    def check(place: int, x: torch.Tensor) -> None:
        assert torch.allclose(packed[place](x), layers[place](x), atol=1e-5)

    x, other = torch.randn(3, 40), torch.randn(3, 40)
    for place in range(3):
        check(place, x)
    check(0, x)
    x.mul_(2)  # the same tensor, changed
    check(1, x)
    assert products == [48, 48, 48]
    for _ in range(5):  # what is made together is not asked for
        check(0, other)
        check(1, x)
    assert products[-2:] == [24, 8]
    with torch.inference_mode():
        inside = torch.randn(3, 40)
        for place in range(3):
            check(place, inside)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_layers_make_one_product_too(products):
    layers = [nn.Linear(40, rows).requires_grad_(False) for rows in (24, 8)]
    packed = [PackedLinear(layer, encode(layer.weight)) for layer in layers]
    PackedLinear.join(packed)
    both = torch.compile(lambda x: [layer(x) for layer in packed], backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 40)
    assert torch.allclose(torch.cat(both(x), 1), torch.cat([layer(x) for layer in layers], 1), atol=1e-5)
    assert products == [32]
    torch.compiler.reset()


def test_the_dense_layers_come_back():
    model, ids = pruned(), tokens(1)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    logits = model(ids).logits
    with resident_as(model, "packed", CPU) as became:
        assert became.layers and all(isinstance(model.get_submodule(name), RowsLinear) for name in became.layers)
    assert before == {name: id(parameter) for name, parameter in model.named_parameters()}
    assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize(
    ("form", "dtype", "message"),
    [
        ("packed", torch.bfloat16, "resident=packed makes no layer of this model smaller on cpu"),
        ("semi-structured", torch.float32, "wants 2:4 weights in bfloat16 or float16 on CUDA"),
        ("csr", torch.float32, "resident='csr' is not allowed|resident=csr"),
    ],
    ids=["bfloat16", "2:4", "unknown"],
)
def test_what_cannot_be_is_refused(form, dtype, message):
    model = pruned(dtype=dtype)
    with pytest.raises(UserError, match=message):
        make_resident(model, form, CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_cuda_with_a_static_cache_and_a_graph(dtype):
    from alps_exp.evaluation.speed import _Graph

    device = torch.device("cuda", 0)
    dense = pruned(dtype=dtype).to(device)
    packed = deepcopy(dense)
    assert make_resident(packed, "packed", device).layers
    ids = tokens(1).to(device)
    one, other = (m(ids).logits.float() for m in (packed, dense))
    assert (one - other).norm() < 8 * torch.finfo(dtype).eps * other.norm()
    with torch.no_grad():
        decoder = _Graph(packed, device, 2, 8, 4)
        decoder.reset()
        decoder.run()
    assert decoder._cache.layers[0].cumulative_length == 12
    generated = packed.generate(ids[:, :5], max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert generated.shape == (1, 11)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_semi_structured_on_cuda(dtype):
    from transformers import AutoModelForCausalLM, LlamaConfig

    from alps_exp.evaluation.speed import _Graph
    from alps_exp.model.resident import SemiStructuredLinear

    device = torch.device("cuda", 0)
    sizes = {"vocab_size": 90, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64, attention_bias=True)
    dense = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).to(device, dtype)
    for name, parameter in dense.named_parameters():
        if parameter.ndim == 2 and ".layers." in name:
            parameter.view(-1, 4)[:, ::2] = 0
    made = deepcopy(dense)
    try:
        torch.sparse.to_sparse_semi_structured(torch.eye(128, device=device, dtype=dtype))
    except RuntimeError:
        pytest.skip("torch has no semi-structured products here")
    report = make_resident(made, "semi-structured", device)
    assert report.layers and all(isinstance(made.get_submodule(name), SemiStructuredLinear) for name in report.layers)
    assert torch.equal(made.get_submodule(report.layers[0]).weight, dense.get_submodule(report.layers[0]).weight)
    for ids in (tokens(1).to(device), tokens(3).to(device)[:, :1]):
        one, other = (model(ids).logits.float() for model in (made, dense))
        assert (one - other).norm() < 8 * torch.finfo(dtype).eps * other.norm()
    decoder = _Graph(made, device, 2, 8, 4)
    decoder.reset()
    decoder.run()
