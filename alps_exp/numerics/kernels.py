"""Which Triton kernels run on a device: each is tried on its first use, on a problem whose answer is known."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from ..base.errors import first_line
from ..base.fallbacks import fell_back


def kernel_for(device: torch.device, name: str) -> Callable | None:
    """A function of `triton_kernels`, `tile_kernels` or `kept_kernels`; None where torch is to do the same work, since
    the device is no GPU, or since the kernel does not compile there or gives another answer, which the record tells.

    Args:
        device: where its arguments will lie.
        name: one of `PROBES`.
    """
    if device.type != "cuda":
        return None
    found = _tried(device, name)
    if isinstance(found, str):
        fell_back(found)
        return None
    return found


@cache
def _tried(device: torch.device, name: str) -> Callable | str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed, so passes run unfused and slower"
    try:
        kernel = _named(name)
        right = PROBES[name](kernel, device)
    except torch.OutOfMemoryError:  # says nothing of the kernel: the next use tries again
        raise
    except Exception as error:  # no C compiler, a card that is too old: whatever it is, there is the plain path
        return f"the Triton kernel {name} does not run here, so its passes run unfused and slower ({first_line(error)})"
    if not right:
        return f"the Triton kernel {name} gives wrong results here, so its passes run unfused and slower"
    return kernel


def _named(name: str) -> Callable:
    from . import kept_kernels, tile_kernels, triton_kernels

    return next(getattr(home, name) for home in (triton_kernels, tile_kernels, kept_kernels) if hasattr(home, name))


def _numbers(count: int, device: torch.device) -> Tensor:
    """(count,) numbers of both signs in disorder, no two of one magnitude, nor where some grow by an eighth."""
    return (torch.arange(count, device=device) * 37 % 16411).float() - 8205.25


def _step(
    kernel: Callable, device: torch.device, support_of: Callable[[Tensor], Tensor], size: int = 128, **own
) -> bool:
    """ADMM's pass against its equations.

    Args:
        support_of: |new T| ↦ what is to be kept.
        size: outputs and inputs of the weight.
        own: arguments of this kernel.
    """
    b = _numbers(size**2, device).view(size, size)
    target, support = b / 4, b.sign() > 0
    change, former = torch.empty_like(b, dtype=torch.bfloat16), target * support
    new = b + (target - former) * 0.5
    expected = support_of(new.abs())
    wanted = 0.25 * (2 * new * expected - b - former)
    kernel(b, target, support, 0.5, 0.25, change, **own)
    same = torch.equal(target, new) and torch.equal(support, expected)
    return same and torch.allclose(change.float(), wanted, rtol=1e-2)


def _largest(score: Tensor, kept: int, width: int) -> Tensor:
    """Of every `width` consecutive entries the `kept` largest."""
    groups = score.reshape(-1, width)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(kept).indices, True).view(score.shape)


def _group_step(kernel: Callable, device: torch.device) -> bool:
    return _step(kernel, device, partial(_largest, kept=2, width=4), group=(2, 4))


def _threshold_step(kernel: Callable, device: torch.device) -> bool:
    return _step(kernel, device, lambda score: score >= 4000, threshold=torch.tensor(4000.0, device=device))


def _sampled_step(kernel: Callable, device: torch.device) -> bool:
    from .triton_kernels import Segments

    segments = Segments([1 << 14], [0.75], [1], device)
    return _step(kernel, device, lambda score: score >= score.view(-1).sort().values[3 << 12], segments=segments)


def _nested_step(kernel: Callable, device: torch.device) -> bool:
    # The better of two groups with the larger of its two entries: the largest of four.
    return _step(kernel, device, partial(_largest, kept=1, width=4), outer=(1, 2), inner=(1, 2))


def _shared_step(kernel: Callable, device: torch.device) -> bool:
    # Each output by itself keeps the larger of the two inputs that it shares with none: the largest of four.
    choices = torch.tensor([3, 5, 9, 6, 10, 12], dtype=torch.int32, device=device)
    return _step(kernel, device, partial(_largest, kept=1, width=4), 8, choices=choices, rows=1, kept=1, width=4)


def _masks_step(kernel: Callable, device: torch.device) -> bool:
    masks = torch.tensor([0x000F, 0x00F0, 0x0F00, 0xF000], dtype=torch.int32, device=device)  # one row of four

    def richest(score: Tensor) -> Tensor:
        energy = score.square().view(32, 4, 32, 4).sum(3)
        return (energy == energy.amax(1, keepdim=True))[..., None].expand(32, 4, 32, 4).reshape(score.shape)

    return _step(kernel, device, richest, masks=masks)


def _pairs_step(kernel: Callable, device: torch.device) -> bool:
    masks = torch.cartesian_prod(*[torch.tensor([3, 5, 9, 6, 10, 12], device=device)] * 4)
    table = (masks[:, :, None] >> torch.arange(4, device=device) & 1).float()
    table = table[(table.sum(1) == 2).all(1)].flatten(1)

    def richest(score: Tensor) -> Tensor:
        energy = score.square().view(32, 4, 32, 4).transpose(1, 2).reshape(-1, 16)
        best = table[(energy[:, None] * table).sum(2).argmax(1)] > 0
        return best.view(32, 32, 4, 4).transpose(1, 2).reshape(score.shape)

    return _step(kernel, device, richest)


def _blocks_step(kernel: Callable, device: torch.device) -> bool:
    def few(energy: Tensor) -> Tensor:
        return energy > energy.mean()

    def richest(score: Tensor) -> Tensor:
        energy = score.square().view(16, 8, 32, 4).sum((1, 3))
        return few(energy)[:, None, :, None].expand(16, 8, 32, 4).reshape(score.shape)

    return _step(kernel, device, richest, tile=(8, 4), keep=few)


def _exchange(kernel: Callable, device: torch.device) -> bool:
    energy = torch.zeros(8, 8, device=device)
    energy[0, 1] = energy[1, 0] = 2
    mask = torch.eye(8, dtype=torch.bool, device=device)
    kernel(energy, mask, 8, torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=device))
    places = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7], device=device)
    return torch.equal(mask, torch.nn.functional.one_hot(places).bool())


def _sweep_step(kernel: Callable, device: torch.device) -> bool:
    # Every other column is pruned, and half of its error goes to the next one.
    work = _numbers(32 * 64, device).view(32, 64)
    factor = torch.eye(32, device=device) + torch.diag(torch.full((31,), 0.5, device=device), 1)
    keep = (torch.arange(32, device=device) % 2 == 1)[:, None].repeat(1, 64)
    found, errors, lost = work.clone(), torch.empty_like(work), work * ~keep
    kernel(found, keep, factor, errors, None)
    wanted = work - lost - 0.5 * lost.roll(1, 0)
    right = torch.allclose(errors, lost) and torch.allclose(found[keep], wanted[keep])
    # Nothing is compensated, and the two best of four are kept.
    chosen = _largest(work.T.abs().contiguous(), 2, 4).T
    kernel(work.clone(), keep, torch.eye(32, device=device), errors, (2, 4))
    return right and torch.equal(keep, chosen) and torch.allclose(errors, work * ~chosen)


def _best_pairs(kernel: Callable, device: torch.device) -> bool:
    # Inputs are independent, so that the best of both kinds make the best pair.
    regrow, prune = -_numbers(64, device).abs().view(2, 32), -_numbers(128, device)[64:].abs().view(2, 32)
    odd = torch.arange(32, device=device) % 2 == 1
    regrow, prune = regrow.masked_fill(odd, torch.inf), prune.masked_fill(~odd, torch.inf)
    value, p, k = kernel(
        torch.eye(32, device=device), torch.ones_like(prune), regrow, prune, regrow + prune.amin(1, True)
    )
    right = torch.equal(p, regrow.argmin(1)) and torch.equal(k, prune.argmin(1))
    return right and torch.allclose(value, regrow.amin(1) + prune.amin(1))


def _combine(kernel: Callable, device: torch.device) -> bool:
    parts = list(_numbers(4 << 10, device).split(1 << 10))
    weights = [0.5, -0.25, 2.0, 1e-3]
    wanted = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    return torch.allclose(kernel(parts, weights, torch.bfloat16).float(), wanted, rtol=1e-2, atol=1.0)


def _small_numbers(count: int, device: torch.device) -> Tensor:
    """(count,) whole numbers from -7 to 7, which float8 holds."""
    return torch.arange(count, device=device) * 37 % 15 - 7.0


def _rounded(kernel: Callable, device: torch.device) -> bool:
    wanted = _small_numbers(3000, device)
    change, left = wanted.half() / 4, wanted.sign() / 256
    rest, eight = left.half(), torch.empty(3000, dtype=torch.float8_e4m3fn, device=device)
    kernel(change, rest, eight, 4.0)
    right = torch.equal(eight.float(), wanted) and torch.equal(rest.float(), left)
    kernel(torch.full_like(change, 1000), rest.zero_(), eight, 4.0)
    return right and bool((eight.float() == 448).all() and (rest == 888).all())


def _add_correction(kernel: Callable, device: torch.device) -> bool:
    b, diagonal = _numbers(64 * 50, device).view(64, 50), _numbers(50, device)
    product = b.flip(0).div(8).bfloat16()
    eight = _small_numbers(64 * 50, device).view(64, 50).to(torch.float8_e4m3fn)
    wanted = b + product.float() + eight.float() * diagonal
    kernel(b, product, eight, diagonal)
    return torch.allclose(b, wanted)


def _bits(kernel: Callable, device: torch.device) -> bool:
    values = _numbers(3000, device)
    mask = values > 0
    kept = kernel(mask)
    into = kept.pick(values, torch.empty(kept.count, device=device))
    right = torch.equal(into, values[mask]) and torch.equal(kept.add(values, into.clone()), 2 * into)
    return right and torch.equal(kept.put(2 * into, values.clone()), torch.where(mask, 2 * values, values))


# Problems with known answers; results of float32 alone are compared bit for bit.
PROBES: dict[str, Callable[[Callable, torch.device], bool]] = {
    "group_step": _group_step,
    "threshold_step": _threshold_step,
    "sampled_step": _sampled_step,
    "nested_step": _nested_step,
    "shared_step": _shared_step,
    "masks_step": _masks_step,
    "pairs_step": _pairs_step,
    "blocks_step": _blocks_step,
    "exchange": _exchange,
    "sweep_step": _sweep_step,
    "best_pairs": _best_pairs,
    "combine": _combine,
    "rounded": _rounded,
    "add_correction": _add_correction,
    "Bits": _bits,
}
