"""The next-token loss of a model that runs block by block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..base.progress import Progress
from .blocks import BlockModel
from .hidden import HiddenStates

# At most this many logits at once (256 MB in float32): a window of a large vocabulary would take gigabytes.
_LOGITS = 2**26


@torch.no_grad()
def next_token_loss(model: BlockModel, tokens: Tensor, batch_size: int, label: str, quiet: bool = False) -> float:
    """Mean over windows of the mean loss of their seqlen - 1 targets, in nats.

    The blocks run one after the other over all windows, so a model larger than the device is evaluated like any other.

    Args:
        model: the model.
        tokens: (windows, seqlen).
        batch_size: windows per forward.
        label: what is done, for the progress.
        quiet: no progress.

    Raises:
        UserError: NaN or infinite activations (the block is named).
    """
    hidden = HiddenStates(model, tokens, batch_size)
    for index in Progress(range(len(model)), label, lines=2, quiet=quiet):
        with model.block(index, changing=False) as block:
            hidden.advance(model, index, block)
    chunks = zip(tokens.split(hidden.sizes), hidden, strict=True)
    return float(torch.cat([_window_losses(model, chunk, states) for chunk, states in chunks]).mean())


def _window_losses(model: BlockModel, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Mean loss of each window's seqlen - 1 targets, (windows,) in float64.

    The final norm and the head act on each position by itself, so slices of positions go through them in turn.
    """
    windows, seqlen = tokens.shape
    step = max(1, _LOGITS // (windows * model.model.config.get_text_config(decoder=True).vocab_size))
    total = torch.zeros(windows, dtype=torch.float64, device=hidden.device)
    for start in range(0, seqlen - 1, step):
        part = slice(start, min(start + step, seqlen - 1))
        logits = model.head(tokens[:, part], hidden[:, part]).float()
        targets = tokens[:, part.start + 1 : part.stop + 1].to(logits.device)
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        total += losses.view(windows, -1).double().sum(1)
    return total / (seqlen - 1)
