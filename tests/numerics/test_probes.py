"""Kernels are tried before they are used: on CUDA, or in Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch
from helpers import interprets_loops, planted

from alps_exp.base import fallbacks
from alps_exp.layer import registry
from alps_exp.layer.inputs import Inputs
from alps_exp.layer.problem import LayerProblem
from alps_exp.numerics import kernels, precision
from alps_exp.patterns import parse_sparsity

pytest.importorskip("triton", reason="Triton is not installed")
cuda = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not cuda and os.environ.get("TRITON_INTERPRET") != "1", reason="neither CUDA nor TRITON_INTERPRET=1"
)
DEVICE = torch.device("cuda" if cuda else "cpu")


@pytest.fixture
def forgetful():
    kernels._tried.cache_clear()
    fallbacks.taken()
    yield
    kernels._tried.cache_clear()


@pytest.mark.parametrize("name", kernels.PROBES)
def test_a_kernel_gives_the_known_answer_and_one_that_does_nothing_does_not(name):
    if name in ("shared_step", "exchange") and not cuda and not interprets_loops():
        pytest.skip("this Triton does not interpret their loops under this NumPy")
    assert kernels.PROBES[name](kernels._named(name), DEVICE)

    class Idle:
        """Bits of everything, and calls that change nothing."""

        count = 3000

        def __init__(self, *arguments, **options) -> None: ...

        def pick(self, tensor, into):
            return into

        add = put = pick

        def __iter__(self):
            return iter(torch.zeros(3, 2, device=DEVICE).unbind())

        def float(self):
            return torch.zeros(1, device=DEVICE)

    assert not kernels.PROBES[name](Idle, DEVICE)


@pytest.mark.parametrize("fault", ["fails", "lies"])
def test_a_kernel_that_does_not_run_is_named_and_the_others_stay(forgetful, monkeypatch, fault):
    def failing(kernel, device):
        if fault == "fails":
            raise RuntimeError("out of registers\nand more")
        return False

    monkeypatch.setitem(kernels.PROBES, "sweep_step", failing)
    device = torch.device("cuda")
    monkeypatch.setattr(kernels, "_named", lambda name: len)
    monkeypatch.setitem(kernels.PROBES, "combine", lambda kernel, device: True)
    with pytest.warns(UserWarning, match="sweep_step") if fault == "fails" else pytest.warns(match="wrong results"):
        assert kernels.kernel_for(device, "sweep_step") is None
    assert kernels.kernel_for(device, "sweep_step") is None
    assert kernels.kernel_for(device, "combine") is len
    (line,) = fallbacks.taken()
    assert "the Triton kernel sweep_step" in line and ("(out of registers)" in line) == (fault == "fails")
    assert fallbacks.taken() == []


@pytest.mark.skipif(not cuda, reason="needs CUDA")
@pytest.mark.parametrize("lost", ["sampled_step", "threshold_step", "combine"])
def test_alps_goes_on_without_one_of_its_kernels(forgetful, monkeypatch, lost):
    made = planted(rows=300, width=256, tokens=3000, seed=5, dtype=torch.float32)
    problem = LayerProblem(made.weight.to(DEVICE), Inputs(gram=made.gram.to(DEVICE)))
    solver, pattern = registry.solver("alps"), parse_sparsity("0.7")
    wanted = problem.relative_loss(solver.solve(problem, pattern).weight)
    assert fallbacks.taken() == []
    kernels._tried.cache_clear()
    monkeypatch.setitem(kernels.PROBES, lost, lambda kernel, device: False)
    found = problem.relative_loss(solver.solve(problem, pattern).weight)
    assert found == pytest.approx(wanted, rel=5e-3)
    (line,) = fallbacks.taken()
    assert lost in line


def test_products_in_float8_that_are_wrong_or_missing_are_told(monkeypatch):
    device = torch.device("cpu")

    def broken(left, right, scale):
        raise RuntimeError("no such product\nand more")

    def exact(left, right, scale):
        return (scale * left.float() @ right.float().T).bfloat16()

    products = {
        "": exact,
        "do not run here (no such product)": broken,
        "are wrong here": lambda *given: 2 * exact(*given),
    }
    for told, product in products.items():
        precision._fault_of_eights.cache_clear()
        monkeypatch.setattr(precision, "eight_product", product)
        assert precision._fault_of_eights(device) == told
    precision._fault_of_eights.cache_clear()
