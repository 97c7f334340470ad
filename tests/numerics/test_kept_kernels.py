"""Kept entries taken out and put back by Triton's kernels and by torch: the same bits."""

import os

import pytest
import torch

from alps_exp.training.masters import Places

triton = pytest.importorskip("triton", reason="Triton is not installed")
cuda = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not cuda and os.environ.get("TRITON_INTERPRET") != "1", reason="neither CUDA nor TRITON_INTERPRET=1"
)
DEVICE = torch.device("cuda" if cuda else "cpu")


@pytest.mark.parametrize(
    ("shape", "share"), [((33, 65), 0.3), ((1, 1), 1.0), ((4, 1024), 0.5), ((40, 96), 0.01), ((3, 1365), 1.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_entries_are_taken_added_and_put_back(shape, share, dtype):
    from alps_exp.numerics.kept_kernels import Bits

    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=generator) < share
    mask[0, 0] = True
    x = torch.randn(shape, generator=generator).to(dtype).to(DEVICE)
    bits, places = (kind(mask.to(DEVICE)) for kind in (Bits, Places))
    assert bits.count == places.count == int(mask.sum())
    assert bits.nbytes <= mask.numel() / 8 + 128 + 8 * (mask.numel() // 1024 + 1)
    # More room than entries, as where their number is made a multiple of something: the rest is left alone.
    one, other = (torch.full((bits.count + 5,), 7.0, device=DEVICE) for _ in range(2))
    for way in ("pick", "add"):
        assert torch.equal(getattr(bits, way)(x, one), getattr(places, way)(x, other))
    assert (one[-5:] == 7).all()
    values = torch.randn(bits.count + 5, generator=generator).to(DEVICE)
    if not cuda and dtype is torch.bfloat16:
        values = values.bfloat16().float()  # Triton's interpreter does not round to it, but cuts off
    one, other = bits.put(values, x.clone()), places.put(values, x.clone())
    assert torch.equal(one, other)
    assert torch.equal(one.cpu()[~mask], x.cpu()[~mask])


def test_what_is_not_contiguous_is_refused():
    from alps_exp.numerics.kept_kernels import Bits

    mask = torch.ones(4, 6, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="contiguous"):
        Bits(mask).pick(torch.randn(6, 4, device=DEVICE).T, torch.empty(24, device=DEVICE))
