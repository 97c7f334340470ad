"""Triangular inverses and their Gram matrices against the library's."""

import pytest
import torch

from alps_exp.numerics import triangular
from alps_exp.numerics.triangular import lower_gram, triangular_inverse


@pytest.mark.parametrize("size", [1, 7, 64, 150, 515])
def test_by_halves(size, monkeypatch):
    monkeypatch.setattr(triangular, "_SMALL", 64)
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(size, size, generator=generator) / size**0.5 + 2 * torch.eye(size)
    result = triangular_inverse(factor)
    factor = factor.tril()
    assert torch.equal(result, result.tril())
    torch.testing.assert_close(result @ factor, torch.eye(size), rtol=0, atol=1e-4)
    torch.testing.assert_close(lower_gram(result), result.T @ result, rtol=1e-4, atol=1e-5)


def test_products_of_powers_are_mirrored(monkeypatch):
    monkeypatch.setattr(triangular, "_SMALL", 8)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(75, 75, generator=generator, dtype=torch.float64)
    matrix = x + x.T
    cube = triangular.symmetric_product(triangular.symmetric_product(matrix, matrix), matrix)
    torch.testing.assert_close(cube, torch.linalg.matrix_power(matrix, 3))
    assert torch.equal(cube[:16, 20:], cube[20:, :16].T)
