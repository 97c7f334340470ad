import pytest
import torch
from torch import nn

from alps_exp.base.errors import UserError
from alps_exp.calibration.capture import Accumulator, Collector
from alps_exp.layer.problem import LayerProblem, Statistics
from alps_exp.model.layers import Layer


def inputs(seed: int = 0, sequences: int = 5, length: int = 7, width: int = 6) -> torch.Tensor:
    return torch.randn(sequences, length, width, generator=torch.Generator().manual_seed(seed)) + 1


@pytest.mark.parametrize("split", [1, 2, 5])
def test_batches_do_not_matter_and_sequences_do(split):
    x = inputs()
    accumulator = Accumulator(6, Statistics.ALL, x.device)
    for chunk in x.split(split):
        accumulator.add(chunk)
    found = accumulator.inputs("one")
    exact = x.double()
    flat = exact.reshape(-1, 6)
    torch.testing.assert_close(found.gram.double(), flat.T @ flat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean.double(), flat.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.var.double(), exact.var(1, unbiased=False).mean(0), rtol=1e-5, atol=1e-6)
    assert (found.tokens, found.sequences) == (35, 5)


def test_the_same_statistics_as_a_problem_from_inputs():
    x = inputs()
    accumulator = Accumulator(6, Statistics.ALL, x.device)
    accumulator.add(x)
    one = LayerProblem(torch.ones(2, 6), accumulator.inputs("one"))
    other = LayerProblem.from_inputs(torch.ones(2, 6), x)
    for name in ("gram", "diagonal", "mean", "var"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))


def test_half_precision_inputs_accumulate_in_float32():
    x = (inputs(sequences=40, length=100) * 30).bfloat16()
    accumulator = Accumulator(6, Statistics.GRAM, x.device)
    accumulator.add(x)
    flat = x.double().reshape(-1, 6)
    torch.testing.assert_close(accumulator.inputs("one").gram.double(), flat.T @ flat, rtol=1e-5, atol=1e-2)


def test_a_diagonal_takes_no_matrix():
    x = inputs()
    accumulator = Accumulator(6, Statistics.DIAGONAL, x.device)
    accumulator.add(x)
    found = accumulator.inputs("one")
    assert set(found.tensors()) == {"diagonal"}
    torch.testing.assert_close(found.diagonal, x.reshape(-1, 6).square().sum(0))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o, self.unused = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.q(x) + self.k(input=x))


def layers_of(module: nn.Module, *names: str) -> dict[str, Layer]:
    return {name: Layer(name, getattr(module, name)) for name in names}


def test_layers_fed_by_one_tensor_share_one_matrix():
    module, x = Attention(), inputs()
    collector = Collector(layers_of(module, "q", "k", "o"), Statistics.GRAM)
    for chunk in x.split(2):
        collector.begin(chunk)
        module(chunk)
    groups = dict((tuple(names), accumulator) for names, accumulator in collector.finish())
    assert set(groups) == {("q", "k"), ("o",)}
    hidden = (module.q(x) + module.k(x)).detach()
    for names, tensor in ((("q", "k"), x), (("o",), hidden)):
        flat = tensor.reshape(-1, 6)
        torch.testing.assert_close(groups[names].inputs("one").gram, flat.T @ flat, rtol=1e-4, atol=1e-3)
    assert not module.q._forward_pre_hooks


def test_equal_values_in_different_tensors_are_not_shared():
    module, x = Attention(), inputs()
    collector = Collector(layers_of(module, "q", "k"), Statistics.DIAGONAL)
    collector.begin(x)
    module.q(x), module.k(x.clone())
    assert [names for names, _ in collector.finish()] == [["q"], ["k"]]


def test_flattened_tokens_find_their_sequences_again():
    module, x = Attention(), inputs()
    collector = Collector(layers_of(module, "q"), Statistics.MOMENTS)
    collector.begin(x)
    module.q(x.reshape(-1, 6))
    found = collector.finish()[0][1].inputs("q")
    torch.testing.assert_close(found.var, x.var(1, unbiased=False).mean(0))
    assert found.sequences == 5


def test_a_layer_without_tokens_is_named():
    module, x = Attention(), inputs()
    collector = Collector(
        {**layers_of(module, "q"), "block.unused": Layer("block.unused", module.unused)}, Statistics.GRAM
    )
    collector.begin(x)
    module(x)
    with pytest.raises(UserError, match=r"block\.unused received no calibration tokens"):
        collector.finish()
