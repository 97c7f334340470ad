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
