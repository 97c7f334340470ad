"""Copies to a device and back."""

import pytest
import torch

from alps_exp.base import staging
from alps_exp.base.staging import Staging

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64])
def test_what_comes_and_goes_is_the_same(monkeypatch, device, dtype):
    monkeypatch.setattr(staging, "_CHUNK", 1 << 10)  # several chunks, the last one not full
    ferry = Staging(torch.device(device))
    home = torch.arange(5000, dtype=dtype).view(50, 100)
    home[3] = 7
    there = ferry.bring(home)
    assert there.device.type == device and torch.equal(there.cpu(), home)
    changed = there * 2
    ferry.send(changed, home)
    assert torch.equal(home, changed.cpu())
    ferry.send(changed.T.contiguous().T, home.zero_())  # of another layout
    assert torch.equal(home, changed.cpu())
    assert ferry.bring(there).device == there.device
