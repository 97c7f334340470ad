"""Gap codes: every entry of the dense matrix, of the size they should be; on CUDA the kernels give the same."""

import pytest
import torch
from torch.nn.functional import linear

from alps_exp.numerics import gap_codes
from alps_exp.numerics.gap_codes import BITS, GROUP, GapCodes, decode, encode, product, stack

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need CUDA")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def sparse(shape, sparsity: float, dtype=torch.bfloat16, device="cpu") -> torch.Tensor:
    """Random, with zeros of both signs, an empty row and a full one, as far as there are so many rows."""
    generator = torch.Generator().manual_seed(round(1000 * sparsity) + shape[1])
    matrix = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) >= sparsity)
    if shape[0] > 4:
        matrix[1], matrix[3] = 0, 1
    return matrix.to(device, dtype)


def read(coded: GapCodes) -> torch.Tensor:
    """The matrix, by the definition: entry by entry."""
    matrix = torch.zeros(coded.shape, dtype=coded.values.dtype)
    for row in range(len(matrix)):
        column = -1
        for group in range(coded.starts[row], coded.starts[row + 1]):
            word = int.from_bytes(bytes(coded.codes[group * coded.bits : (group + 1) * coded.bits].tolist()), "little")
            for entry in range(GROUP):
                column += (word >> (coded.bits * entry) & ((1 << coded.bits) - 1)) + 1
                value = coded.values[group * GROUP + entry]
                assert column < coded.cols + GROUP
                if value != 0:
                    matrix[row, column] = value
    return matrix


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sparsity", "bits"), [(0.3, 3), (0.8, 4), (0.97, 8)])
def test_a_matrix_comes_back(dtype, sparsity, bits):
    matrix = sparse((9, 600), sparsity, dtype)
    matrix[0, 7] = float("nan")
    matrix[2] = 0
    matrix[2, 599] = 1  # a gap that takes entries to cross
    coded = encode(matrix)
    assert coded.bits == bits or (dtype == torch.float32 and coded.bits in BITS)
    for again in (read(coded), decode(coded)):
        assert torch.equal(again.nan_to_num(7e3), matrix.nan_to_num(7e3))


def test_nothing_but_zeros():
    coded = encode(torch.zeros(3, 16, dtype=torch.float16))
    assert len(coded.values) == 0 and not decode(coded).any() and decode(coded).shape == (3, 16)
    assert not product(torch.ones(2, 16, dtype=torch.float16), coded).any()


@pytest.mark.parametrize(("sparsity", "most"), [(0.5, 0.605), (0.7, 0.38), (0.8, 0.26), (0.9, 0.155)])
def test_bytes_over_those_of_the_dense_matrix(sparsity, most):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 4096, generator=generator) * (torch.rand(64, 4096, generator=generator) >= sparsity)
    coded = encode(matrix.bfloat16())
    assert coded.nbytes / (2 * matrix.numel()) < most


def test_products_without_kernels_are_the_dense_ones():
    matrix, x, bias = sparse((9, 600), 0.7, torch.float32), torch.randn(3, 600), torch.randn(9)
    assert torch.equal(product(x, encode(matrix), bias), linear(x, matrix, bias))


@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.97])
def test_matrices_one_below_the_other(sparsity):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrices = [sparse((rows, 600), sparsity, torch.float32, device) for rows in (9, 4, 70)]
    stacked, x = stack([encode(matrix) for matrix in matrices]), torch.randn(3, 600, device=device)
    near = {"rtol": 1e-4, "atol": 1e-4}
    assert torch.equal(decode(stacked), torch.cat(matrices))
    assert torch.equal(read(stacked), torch.cat(matrices).cpu())
    torch.testing.assert_close(product(x, stacked), linear(x, torch.cat(matrices)), **near)
    bias = torch.randn(83, device=device)
    for inputs in (x, torch.randn(40, 600, device=device)):
        for given in (None, bias):
            found = gap_codes.products(inputs, stacked, [9, 4, 70], given)
            assert [part.shape[1] for part in found] == [9, 4, 70]
            torch.testing.assert_close(torch.cat(tuple(found), 1), linear(inputs, torch.cat(matrices), given), **near)
    for matrix, (begin, end) in zip(matrices, [(0, 9), (9, 13), (13, 83)], strict=True):
        part = stacked.between(begin, end)
        assert torch.equal(decode(part), matrix) and part.shape == matrix.shape
        torch.testing.assert_close(product(x, part), linear(x, matrix), **near)
    with pytest.raises(ValueError, match="equal widths, bits and dtypes"):
        stack([encode(matrices[0]), encode(matrices[0].half())])


def test_inputs_of_another_dtype_are_refused():
    coded = encode(sparse((9, 600), 0.7, torch.float16))
    with pytest.raises(TypeError, match="float16 weights wants the same of its inputs"):
        product(torch.randn(3, 600), coded)
    with pytest.raises(TypeError, match="wants the same"):
        product(torch.randn(3, 600).half(), coded, torch.randn(9))


@cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300, 504), (64, 11008), (8, 28672), (5, 8)])
@pytest.mark.parametrize("sparsity", [0.3, 0.75, 0.95])
def test_kernels_on_cuda(dtype, shape, sparsity):
    matrix = sparse(shape, sparsity, dtype, "cuda")
    coded = encode(matrix)
    assert torch.equal(decode(coded), matrix)
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    for rows in (1, 2, 3, 5, 8, 11, 40):
        x = torch.randn(rows, shape[1], device="cuda").to(dtype)
        exact = x.double() @ matrix.double().T + bias.double()
        found = (product(x, coded, bias), linear(x, matrix, bias))
        errors = [float((y.double() - exact).norm() / exact.norm()) for y in found]
        assert errors[0] <= max(1.5 * errors[1], 3e-6), (rows, errors)


@cuda
def test_products_in_a_graph_and_of_inputs_that_are_not_aligned():
    matrix = sparse((512, 1024), 0.7, torch.float16, "cuda")
    coded, x = encode(matrix), torch.randn(1025, device="cuda").half()[1:].view(1, 1024)
    expected = linear(x, matrix)
    product(x, coded)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = product(product(x, coded)[:, :512].repeat(1, 2) * 0 + x, coded)
    y.zero_()
    graph.replay()
    assert torch.allclose(y, expected, rtol=1e-2, atol=1e-2)
