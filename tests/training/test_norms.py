"""Fused norms: which modules are norms, and that a fused one computes the same."""

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from alps_exp.training import norms


def weighted(kind: type[nn.Module], dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    torch.manual_seed(0)
    made = kind(24, **options)
    nn.init.normal_(made.weight, 0.5, 0.4)
    return made.to(dtype)


class Halved(LlamaRMSNorm):
    """More than a norm."""

    def forward(self, hidden_states):
        return super().forward(hidden_states) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "offset"), [(LlamaRMSNorm, 0.0), (Gemma3RMSNorm, 1.0), (nn.RMSNorm, 0.0), (Halved, None)]
)
def test_norms_are_known_by_what_they_do(kind, offset, dtype):
    options = {"eps": 1e-5} if kind is nn.RMSNorm else {}
    assert norms.matching_offset(weighted(kind, dtype, **options)) == offset


class Gated(LlamaRMSNorm):
    """A norm that takes more than the hidden states."""

    def forward(self, hidden_states, gate):
        return super().forward(hidden_states) * gate


def test_a_layer_norm_is_none():
    norm = weighted(nn.LayerNorm, bias=False)
    assert norms.matching_offset(norm) is None
    nn.init.zeros_(norm.weight)
    assert norms.matching_offset(norm) is None


def test_norms_that_are_more_are_left_alone(monkeypatch):
    monkeypatch.setattr(nn.Parameter, "is_cuda", True)
    found = {"plain": weighted(LlamaRMSNorm), "gated": weighted(Gated), "hooked": weighted(LlamaRMSNorm)}
    found["hooked"].register_forward_hook(lambda *_: None)
    found |= {str(dtype): weighted(Gemma3RMSNorm, dtype) for dtype in (torch.float32, torch.bfloat16)}
    offsets = {name: norms._offset(norm) for name, norm in found.items()}
    assert offsets == {"plain": 0, "gated": None, "hooked": None, "torch.float32": 1, "torch.bfloat16": None}


@pytest.mark.parametrize(("kind", "offset"), [(LlamaRMSNorm, 0.0), (Gemma3RMSNorm, 1.0)])
def test_the_fused_norm_and_its_gradients_are_those_of_the_written_one(kind, offset):
    norm = weighted(kind, torch.float64)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    found = []
    for forward in (norm.forward, norms._fused(norm, offset)):
        given = x.clone().requires_grad_()
        output = forward(given)
        norm.zero_grad()
        output.square().sum().backward()
        found.append((output.detach(), given.grad, norm.weight.grad.clone()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # the written one computes in float32


def test_on_a_cpu_all_stays_as_it_is():
    module = nn.Sequential(weighted(LlamaRMSNorm))
    with norms.fused_norms(module):
        assert "forward" not in vars(module[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_norms_run_fused_and_are_what_they_were_afterwards():
    module = nn.Sequential(weighted(LlamaRMSNorm), weighted(Halved)).cuda().bfloat16()
    x = torch.randn(3, 24, device="cuda", dtype=torch.bfloat16)
    wanted = module(x)
    with norms.fused_norms(module):
        assert ["forward" in vars(part) for part in module] == [True, False]
        torch.testing.assert_close(module(x), wanted, rtol=2e-2, atol=2e-2)
    assert not any("forward" in vars(part) for part in module)
