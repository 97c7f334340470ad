"""A feed-forward part pruned as a whole, by alternating minimisation over its weights and its activations.

    min  α‖z - (xW₁ᵀ + b₁)‖² + α‖s - (xW_gᵀ + b_g)‖² + β‖y - pW₂ᵀ‖² + γ‖p - φ‖²

over W₁, W_g and W₂ with zeros, and z, s and p:

    x    (tokens, in)          the part's input
    z    (tokens, channels)    outputs of the up layer W₁
    s    (tokens, channels)    outputs of the gate W_g, of a gated part
    φ    (tokens, channels)    relu(z), or act(s) z with the gate's activation, SiLU or GELU
    p    (tokens, channels)    inputs of the down layer W₂
    y    (tokens, out)         what the dense down layer gives, without its bias: fixed
    K    (out, out)            (W₂W₂ᵀ + (γ/β)I)⁻¹

z, s and p begin at the dense activations. A round fits the weights to them (not the first), prunes each, and updates

    p ← φ + (y - φW₂ᵀ) K W₂
    z ← with m = xW₁ᵀ + b₁: the better of max(0, (γp + αm) / (α + γ)) and min(0, m); gated: (αm + γ act(s) p) /
        (α + γ act(s)²)
    s ← s - step · gradient of α‖s - (xW_gᵀ + b_g)‖² + γ‖p - act(s) z‖², so many times; step is the rate, or where that
        is less, one over a bound of the second derivative

The update of p is (βW₂ᵀW₂ + γI)⁻¹(βW₂ᵀy + γφ) with its large inverse left out. The fits are, for a plain part's down
layer, gradient steps on the mean square of y - pW₂ᵀ, and otherwise least squares, in the form W_dense + (what the
activations have moved) X⁺: what the inputs leave open stays as in the dense layer.

No activation is kept. Those of a token follow from x and the weights of the rounds before; fits and pruning need sums
over tokens only: ΔzᵀX and ΔsᵀX (channels, in), (y - pW₂ᵀ)ᵀP (out, channels), PᵀP (channels, channels). They are made
anew in each round, some tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from ..base.errors import UserError


@dataclass(frozen=True)
class Activation:
    """That of a gate.

    Some tokens of real models drive a few channels to thousands: there a gradient step of fixed length overshoots, and
    each round multiplies the error. (The authors leave such blocks of LLaMA out.) So steps go by the second derivative.

    Attributes:
        function: act.
        sloped: s ↦ act(s), act'(s).
        slope, bend: bounds of |act'| and |act''|.
    """

    function: Callable[[Tensor], Tensor]
    sloped: Callable[[Tensor], tuple[Tensor, Tensor]]
    slope: float
    bend: float


def _silu(s: Tensor) -> tuple[Tensor, Tensor]:
    sigmoid = s.sigmoid()
    return s * sigmoid, sigmoid * (1 + s * (1 - sigmoid))


def _gelu(s: Tensor) -> tuple[Tensor, Tensor]:
    share = torch.special.ndtr(s)
    return s * share, share + s * torch.exp(-s.square() / 2) / math.sqrt(2 * math.pi)


def _gelu_by_tanh(s: Tensor) -> tuple[Tensor, Tensor]:
    scale = math.sqrt(2 / math.pi)
    tanh = torch.tanh(scale * (s + 0.044715 * s**3))
    share = (1 + tanh) / 2
    return s * share, share + s * (1 - tanh.square()) / 2 * scale * (1 + 3 * 0.044715 * s.square())


def gelu_by_tanh(s: Tensor) -> Tensor:
    """GELU as Gemma has it."""
    return gelu(s, approximate="tanh")


SILU = Activation(silu, _silu, 1.1, 0.5)
ACTIVATIONS = (SILU, Activation(gelu_by_tanh, _gelu_by_tanh, 1.13, 0.8), Activation(gelu, _gelu, 1.13, 0.8))


@dataclass(frozen=True, eq=False)
class Weights:
    """Those of a feed-forward part; gate and biases may be missing.

    Attributes:
        up, gate: (channels, in).
        down: (out, channels).
        up_bias, gate_bias: (channels,).
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(tokens, channels) of up and of the gate."""
        linear = torch.nn.functional.linear
        gate = None if self.gate is None else linear(x, self.gate, self.gate_bias)
        return linear(x, self.up, self.up_bias), gate


@dataclass(frozen=True)
class Penalties:
    """What the alternation weighs, and how far its gradient steps go.

    Attributes:
        alpha, beta, gamma: α, β and γ.
        steps, rate: of the fit of a plain part's down layer.
        sweeps, gate_rate: gradient steps of s in a round.
        ridge: of least squares, in units of the scaled Gram matrix's diagonal.
        raised: what it had to be instead, of each Gram matrix that was not positive definite with it.
        activation: of a gate.
    """

    alpha: float
    beta: float
    gamma: float
    steps: int = 10
    rate: float = 0.01
    sweeps: int = 2
    gate_rate: float = 0.01
    ridge: float = 1e-6
    raised: list[float] = field(default_factory=list, compare=False)
    activation: Activation = SILU


@dataclass(eq=False)
class Sums:
    """What a round needs to know of all tokens; see the module's head."""

    up: Tensor
    down: Tensor
    channels: Tensor
    gate: Tensor | None
    tokens: int = 0


def alternate(
    dense: Weights,
    inputs: Callable[[], Iterable[Tensor]],
    gram: Tensor,
    channels: Tensor,
    prune: Callable[[Weights, Tensor], Weights],
    penalties: Penalties,
    rounds: int,
) -> Weights:
    """The pruned weights after `rounds` rounds, in float32 or float64.

    Args:
        dense: the part's weights.
        inputs: called once for every round but the first: x (tokens, in), some tokens at a time.
        gram: (in, in) of x.
        channels: (channels, channels) PᵀP of the dense p.
        prune: fitted weights and PᵀP ↦ pruned weights.
        penalties: α, β, γ and steps.
        rounds: at least 1; one prunes the dense weights.
    """
    history = [prune(dense, channels)]
    for _ in range(rounds - 1):
        sums = _summed(dense, history, inputs(), penalties)
        history.append(prune(_fitted(dense, history[-1], sums, gram, penalties), sums.channels))
    return history[-1]


def _summed(dense: Weights, history: list[Weights], inputs: Iterable[Tensor], penalties: Penalties) -> Sums:
    down, up = torch.zeros_like(dense.down), torch.zeros_like(dense.up)
    gate = None if dense.gate is None else torch.zeros_like(dense.gate)
    sums = Sums(up, down, down.new_zeros(down.shape[1], down.shape[1]), gate)
    inverses = [_inverse(weights.down, penalties.gamma / penalties.beta) for weights in history]
    for x in inputs:
        x = x.to(dense.up.dtype)
        moved_up, moved_gate, missing, p = _moved(dense, history, inverses, x, penalties)
        sums.up.addmm_(moved_up.T, x)
        if moved_gate is not None:
            sums.gate.addmm_(moved_gate.T, x)
        sums.down.addmm_(missing.T, p)
        sums.channels.addmm_(p.T, p)
        sums.tokens += len(x)
    return sums


def _inverse(down: Tensor, ratio: float) -> Tensor:
    """K."""
    matrix = down.double() @ down.double().T
    matrix.diagonal().add_(ratio)
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix)).to(down.dtype)


def _moved(
    dense: Weights, history: list[Weights], inverses: list[Tensor], x: Tensor, penalties: Penalties
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """z and s less what they are in the dense model, y - p W₂ᵀ with the dense W₂, and p, after all rounds so far."""
    z0, s0 = dense.outputs(x)
    z, s = z0, s0
    p = _activated(z, s, penalties)
    y = p @ dense.down.T
    for weights, inverse in zip(history, inverses, strict=True):
        phi = _activated(z, s, penalties)
        p = torch.addmm(phi, (y - phi @ weights.down.T) @ inverse, weights.down)
        z, s = updated(*weights.outputs(x), p, s, penalties)
    return z - z0, None if s is None else s - s0, y - p @ dense.down.T, p


def _activated(z: Tensor, s: Tensor | None, penalties: Penalties) -> Tensor:
    return z.relu() if s is None else penalties.activation.function(s) * z


def updated(
    m: Tensor, m_gate: Tensor | None, p: Tensor, s: Tensor | None, penalties: Penalties
) -> tuple[Tensor, Tensor | None]:
    """z and s, entry by entry.

    Args:
        m: (tokens, channels) outputs of the pruned up layer, and
        m_gate: of the pruned gate.
        p: (tokens, channels).
        s: the former s.
        penalties: α, γ and the steps of s.
    """
    alpha, gamma = penalties.alpha, penalties.gamma
    if s is None:
        above, below = ((gamma * p + alpha * m) / (alpha + gamma)).clamp_min_(0), m.clamp_max(0)
        cost = alpha * (above - m).square_() + gamma * (p - above).square_()
        other = alpha * (below - m).square_() + gamma * p.square()
        return torch.where(cost <= other, above, below), None
    activation = penalties.activation
    active = activation.function(s)
    z = (alpha * m + gamma * active * p) / (alpha + gamma * active.square())
    for _ in range(penalties.sweeps):
        active, slope = activation.sloped(s)
        missed = active * z - p
        gradient = 2 * alpha * (s - m_gate) + 2 * gamma * missed * slope * z
        curvature = 2 * alpha + 2 * gamma * (activation.slope**2 * z.square() + activation.bend * (missed * z).abs())
        s = s - curvature.reciprocal_().clamp_max_(penalties.gate_rate) * gradient
    return z, s


def _fitted(dense: Weights, last: Weights, sums: Sums, gram: Tensor, penalties: Penalties) -> Weights:
    solve = GramSolve(gram, penalties.ridge, penalties.raised)
    up = dense.up + solve(sums.up)
    if dense.gate is not None:
        down = dense.down + GramSolve(sums.channels, penalties.ridge, penalties.raised)(sums.down)
        return replace(dense, up=up, gate=dense.gate + solve(sums.gate), down=down)
    down, rate = last.down, 2 * penalties.rate / (sums.tokens * len(last.down))
    for _ in range(penalties.steps):
        down = down - rate * ((down - dense.down) @ sums.channels - sums.down)
    return replace(dense, up=up, down=down)


class GramSolve:
    """right ↦ right G⁻¹, for a Gram matrix G, scaled to a unit diagonal; dead inputs get 0.

    The ridge is added to the scaled diagonal. Where G is not positive definite even so, it grows tenfold until it is,
    and what it has become is appended to `raised`.
    """

    def __init__(self, gram: Tensor, ridge: float, raised: list[float]) -> None:
        asked = ridge
        diagonal = gram.diagonal().double()
        self._scale = torch.where(diagonal > 0, diagonal, 1).rsqrt() * (diagonal > 0)
        matrix = gram.double() * self._scale * self._scale[:, None]
        while True:
            matrix.diagonal().fill_(1 + ridge)
            self._factor, info = torch.linalg.cholesky_ex(matrix)
            if not int(info):
                raised += [ridge] if ridge > asked else []
                return
            ridge = max(10 * ridge, 1e-9)
            if ridge > 1:
                raise UserError("the Gram matrix of a feed-forward part has negative eigenvalues: check the checkpoint")

    def __call__(self, right: Tensor) -> Tensor:
        scaled = (right.double() * self._scale).T
        return (torch.cholesky_solve(scaled, self._factor).T * self._scale).to(right.dtype)
