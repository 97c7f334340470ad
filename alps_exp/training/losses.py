"""What trainings minimise."""

from __future__ import annotations

from collections.abc import Callable, Iterable

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


class _Pieces(torch.autograd.Function):
    """The sum of a loss over pieces of its input. Each piece's gradient is made beside its value, so that no more than
    one piece's work is held at a time."""

    @staticmethod
    def forward(ctx, hidden: Tensor, spans: list, loss: Callable) -> Tensor:
        made, total = torch.empty_like(hidden), torch.zeros((), device=hidden.device)
        for window, part in spans:
            piece = hidden[window : window + 1, part].detach().requires_grad_()
            with torch.enable_grad():
                value = loss(window, part, piece)
            (made[window : window + 1, part],) = torch.autograd.grad(value, piece)
            total += value.detach()
        ctx.save_for_backward(made)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (made,) = ctx.saved_tensors
        return made * gradient, None, None


def divergence_in_pieces(
    hidden: Tensor,
    positions: int,
    logits: Callable[[int, slice, Tensor], Tensor],
    wanted: Callable[[int, slice], Tensor],
) -> Tensor:
    """`divergence` where the logits of a window are too many to be held at once.

    Args:
        hidden: (windows, seqlen, width) what the logits are made of, position by position, with gradients.
        positions: how many positions' logits are held at a time.
        logits: (window, slice of positions, their part of `hidden`, with one window) → (1, positions, vocabulary).
        wanted: (window, slice of positions) → likewise, without gradients.
    """
    windows, seqlen = hidden.shape[:2]
    starts = range(0, seqlen, positions)
    spans = [(window, slice(at, min(at + positions, seqlen))) for window in range(windows) for at in starts]

    def loss(window: int, part: slice, piece: Tensor) -> Tensor:
        return _Divergence.apply(logits(window, part, piece), wanted(window, part))

    if torch.is_grad_enabled():
        total = _Pieces.apply(hidden, spans, loss)
    else:
        total = sum(loss(window, part, hidden[window : window + 1, part]) for window, part in spans)
    return total / (windows * seqlen)
