"""What trainings minimise."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def relative_error(output: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of ‖o - y‖² / ‖y‖², in float32.

    Args:
        output: (windows, seqlen, width) o.
        wanted: likewise, y.
    """
    wanted = wanted.float()
    error = (output.float() - wanted).square().sum(-1)
    return (error / wanted.square().sum(-1).clamp_min(1e-30)).mean()


class _Divergence(torch.autograd.Function):
    """Sum over tokens of KL(p ‖ q). Its gradient, q - p, is made beside the value and kept in the logits' dtype:
    nothing in float32 outlasts the forward."""

    @staticmethod
    def forward(ctx, logits: Tensor, wanted: Tensor) -> Tensor:
        log_q = torch.log_softmax(logits.float(), -1)
        log_p = torch.log_softmax(wanted.float(), -1)
        p = log_p.exp()
        value = (p * (log_p - log_q)).sum()
        ctx.save_for_backward((log_q.exp_() - p).to(logits.dtype))
        return value

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * gradient, None


def divergence(logits: Tensor, wanted: Iterable[Tensor]) -> Tensor:
    """Mean over tokens of KL(p ‖ q), p = softmax(wanted), q = softmax(logits), in nats.

    Args:
        logits: (windows, seqlen, vocabulary), with gradients.
        wanted: (seqlen, vocabulary) of one window after the other, without.
    """
    total = sum(_Divergence.apply(ours, theirs) for ours, theirs in zip(logits, wanted, strict=True))
    return total / logits[..., 0].numel()
