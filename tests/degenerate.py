"""Degenerate layers, drawn by hypothesis."""

from __future__ import annotations

import dataclasses

import torch
from helpers import planted_inputs
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from alps_exp.layer.problem import LayerProblem
from alps_exp.patterns import NM, parse_sparsity

INPUT_DEFECTS = ("dead", "all dead", "constant", "copies", "outlier", "tiny", "rank one")
WEIGHT_DEFECTS = ("zero", "zero rows", "alike", "zero on the living", "wide range")


def bounded(examples: int):
    """The same examples in every run, so that a failure is one for everybody."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@dataclasses.dataclass(frozen=True)
class Layer:
    """A degenerate layer before its scales."""

    rows: int
    width: int
    tokens: int
    input_defects: frozenset[str]
    weight_defect: str | None
    dtype: torch.dtype
    seed: int

    def problem(self, weights: int = 0, inputs: int = 0) -> LayerProblem:
        """The layer with weights scaled by 2^weights and inputs by 2^inputs."""
        generator = torch.Generator().manual_seed(self.seed)
        x = planted_inputs(self.tokens, self.width, self.seed, sequences=1)
        some = torch.rand(self.width, generator=generator) < 0.5
        if "rank one" in self.input_defects:
            x = x[:, :1] * x[:1]
        if "copies" in self.input_defects:
            x[:, some] = x[:, :1].clone()
        if "constant" in self.input_defects:
            x[:, some.flip(0)] = 1.0
        if "outlier" in self.input_defects:
            x[:, -1] *= 2.0**12
        if "tiny" in self.input_defects:
            x[:, 0] *= 2.0**-12
        if "dead" in self.input_defects:
            x[:, some] = 0
        if "all dead" in self.input_defects:
            x[:] = 0
        w = torch.randn(self.rows, self.width, generator=generator, dtype=torch.float64)
        if self.weight_defect == "zero":
            w[:] = 0
        elif self.weight_defect == "zero rows":
            w[::2] = 0
        elif self.weight_defect == "alike":
            w[:] = -1.5
        elif self.weight_defect == "zero on the living":
            w[:, ~some] = 0
        elif self.weight_defect == "wide range":
            w *= 2.0 ** torch.arange(0, -24, -24 / self.width, dtype=torch.float64)[: self.width]
        # Rounded before they are scaled, so that every scale has the same digits.
        w, x = w.to(self.dtype).double() * 2.0**weights, x.to(self.dtype).double() * 2.0**inputs
        return LayerProblem.from_inputs(w.to(self.dtype), x.to(self.dtype), name="layers.7.mlp.fc1")


def layers(written: str) -> st.SearchStrategy[Layer]:
    """Layers whose width the pattern fits."""
    pattern = parse_sparsity(written)
    widths = [pattern.width, 3 * pattern.width, 24] if isinstance(pattern, NM) else [1, 2, 7, 24]
    return st.builds(
        Layer,
        rows=st.sampled_from([1, 2, 9]),
        width=st.sampled_from(widths),
        tokens=st.sampled_from([1, 2, 16, 60]),
        input_defects=st.frozensets(st.sampled_from(INPUT_DEFECTS), max_size=3),
        weight_defect=st.sampled_from([None, None, *WEIGHT_DEFECTS]),
        dtype=st.sampled_from([torch.float32, torch.float32, torch.float64]),
        seed=st.integers(0, 1000),
    )
