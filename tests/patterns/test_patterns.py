"""Patterns: exact counts, the tie rule, what is refused."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import assert_exact, stable_top
from hypothesis import given, settings
from hypothesis import strategies as st

from alps_exp.base.errors import UserError
from alps_exp.patterns import NM, Unstructured, parse_sparsity, written

levels = st.integers(1, 999).map(lambda thousandths: f"0.{thousandths:03d}")
shapes = st.tuples(st.integers(1, 7), st.integers(1, 120))


def scores(shape: tuple[int, int], seed: int, distinct: int) -> torch.Tensor:
    """Non-negative scores with many ties where `distinct` is small."""
    return torch.randint(0, distinct, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(written=levels, shape=shapes, seed=st.integers(0, 99), distinct=st.sampled_from([1, 2, 10, 10**6]))
def test_unstructured_counts_are_exact_and_ties_keep_the_first(written, shape, seed, distinct):
    score, pattern = scores(shape, seed, distinct), parse_sparsity(written)
    for scope, selection in (("layer", "layer"), ("row", "row"), ("block", f"block of {shape[1]} columns")):
        mask = pattern.keep(score, scope)
        assert_exact(mask, pattern, written, selection)
        lines = zip(score, mask, strict=True) if scope == "row" else [(score.view(-1), mask.view(-1))]
        for values, kept in lines:
            assert np.array_equal(kept.numpy(), stable_top(values.numpy(), int(kept.sum())))


@settings(deadline=None, max_examples=150)
@given(
    width=st.integers(2, 12), data=st.data(), groups=st.integers(1, 6), seed=st.integers(0, 99),
    distinct=st.sampled_from([1, 2, 3, 10**6]),
)  # fmt: skip
def test_nm_counts_are_exact_and_ties_keep_the_first(width, data, groups, seed, distinct):
    kept = data.draw(st.integers(1, width - 1))
    score = scores((5, groups * width), seed, distinct)
    mask = NM(kept, width).keep(score)
    for values, chosen in zip(score.view(-1, width), mask.view(-1, width), strict=True):
        assert np.array_equal(chosen.numpy(), stable_top(values.numpy(), kept))


@pytest.mark.parametrize(
    ("written", "row", "expected"),
    [
        ("2:4", [1, 1, 1, 1], [1, 1, 0, 0]),
        ("2:4", [0, 2, 2, 1], [0, 1, 1, 0]),
        ("2:4", [3, 1, 1, 1, 0, 0, 0, 5], [1, 1, 0, 0, 1, 0, 0, 1]),
        ("1:4", [0, 2, 2, 1], [0, 1, 0, 0]),
        ("1:4", [0, 0, 0, 0], [1, 0, 0, 0]),
        ("3:4", [1, 2, 2, 1], [1, 1, 1, 0]),
        ("4:8", [1, 2, 1, 2, 1, 2, 1, 1], [1, 1, 0, 1, 0, 1, 0, 0]),
        ("1:2", [4, 4, 3, 5], [1, 0, 0, 1]),
        ("2:9", [1, 1, 1, 1, 1, 1, 1, 1, 2], [1, 0, 0, 0, 0, 0, 0, 0, 1]),
    ],
)
def test_nm_by_hand(written, row, expected):
    mask = parse_sparsity(written).keep(torch.tensor([row], dtype=torch.float32))
    assert mask.int().tolist() == [expected]


@pytest.mark.parametrize(("written", "width"), [("0.29", 100), ("0.57", 100), ("0.58", 50), ("0.07", 100), ("0.7", 10)])
def test_binary_fractions_do_not_lose_a_weight(written, width):
    # Each of these products, or one minus it, is not a whole number in binary floating point.
    score = torch.rand(3, width, generator=torch.Generator().manual_seed(0))
    removed = Fraction(written) * width
    assert removed.denominator == 1
    assert ((~parse_sparsity(written).keep(score, "row")).sum(1) == int(removed)).all()
    assert int((~parse_sparsity(written).keep(score, "block")).sum()) == 3 * removed
    assert int((~parse_sparsity(written).keep(score, "layer")).sum()) == 3 * removed


def _hard_cases(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(size, generator=generator)
    return {
        "uniform": noise,
        "sorted": noise.sort().values,
        "constant": torch.ones(size),
        "half zero": noise * (noise > 0.5),
        "few values": (noise * 5).floor(),
        "period of the sample": torch.where(torch.arange(size) % (size // 8192 | 1) == 0, 1000 * noise, noise),
        "one spike": torch.zeros(size).index_fill(0, torch.tensor([size // 2]), 7.0),
        "huge range": torch.exp(80 * (noise - 0.5)),
    }


@pytest.mark.parametrize("case", _hard_cases(8))
@pytest.mark.parametrize("size", [2**16, 300 * 257])
def test_selection_from_large_tensors_equals_a_stable_sort(case, size):
    # Sizes at which the threshold is searched for in a sample's bracket.
    values = _hard_cases(size)[case]
    for level in (0.001, 0.3, 0.5, 0.9, 0.999):
        mask = Unstructured(level).keep(values.view(4, -1))
        expected = stable_top(values.numpy(), round((1 - level) * size))
        assert np.array_equal(mask.view(-1).numpy(), expected)


def test_a_transposed_score_is_selected_in_row_major_order():
    score = torch.zeros(6, 4)
    straight = Unstructured(0.5).keep(score)
    assert torch.equal(Unstructured(0.5).keep(torch.zeros(4, 6).T), straight)
    assert straight.view(-1).tolist() == [True] * 12 + [False] * 12


def test_written_patterns_are_read_back_and_sorted():
    texts = ["0.5", "0.65", "0.7", "2:4", "4:8", "1:4"]
    for text in texts:
        pattern = parse_sparsity(text)
        assert pattern.written == text and written.of_slug(pattern.slug) == text
        assert written.pattern_of(written.node_of(pattern)) == pattern
    assert sorted([*texts, "0", "row@0.3"], key=written.order) == [
        "0",
        "0.5",
        "0.65",
        "0.7",
        "2:4",
        "1:4",
        "4:8",
        "row@0.3",
    ]
    assert written.of_slug("x9") is None and written.of_slug("u7") is None


def test_what_is_written_needs_no_torch():
    code = (
        "import sys; from alps_exp.patterns import parse_sparsity; parse_sparsity('2:4'); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_the_score_is_not_changed():
    score = torch.rand(9, 12, generator=torch.Generator().manual_seed(0))
    before = score.clone()
    for pattern in (Unstructured(0.5), NM(2, 4), NM(5, 12)):
        for scope in ("layer", "row", "block"):
            pattern.keep(score, scope)
    assert torch.equal(score, before)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.7, Unstructured(0.7)),
        ("0.7", Unstructured(0.7)),
        (" 2:4 ", NM(2, 4)),
        ("1:4", NM(1, 4)),
        (NM(4, 8), NM(4, 8)),
    ],
)
def test_parse(value, expected):
    assert parse_sparsity(value) == expected


@pytest.mark.parametrize(
    "value",
    [0, 1, "0", "1.0", 1.5, -0.1, "nan", "inf", True, None, "", "half", "4:4", "0:4", "5:4", "2:4:8", 124],
)
def test_parse_refuses(value):
    with pytest.raises(UserError) as error:
        parse_sparsity(value)
    assert "\n" not in str(error.value)
    assert "is not allowed" in str(error.value)


def test_an_unquoted_nm_is_explained():
    with pytest.raises(UserError, match="quote it"):
        parse_sparsity(124)


@pytest.mark.parametrize(
    ("pattern", "sparsity", "group", "slug", "text"),
    [
        (Unstructured(0.7), 0.7, None, "u0.7", "0.7"),
        (NM(2, 4), 0.5, 4, "2of4", "2:4"),
        (NM(1, 4), 0.75, 4, "1of4", "1:4"),
    ],
)
def test_properties(pattern, sparsity, group, slug, text):
    assert math.isclose(pattern.sparsity, sparsity)
    assert (pattern.group, pattern.slug, str(pattern)) == (group, slug, text)


def test_a_width_that_does_not_divide_is_refused_by_name():
    NM(2, 4).check((3, 8), "layers.0.q_proj")
    with pytest.raises(UserError, match=r"2:4 does not fit layers\.0\.q_proj.* 10 inputs.*M that fit: 5, 10, or"):
        NM(2, 4).check((3, 10), "layers.0.q_proj")
    with pytest.raises(UserError):
        NM(2, 4).keep(torch.rand(3, 10))
