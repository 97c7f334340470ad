"""The Triton kernels of tiles and nested groups against the patterns' own rules: on CUDA, or interpreted."""

import os
from functools import partial

import pytest
import torch
from helpers import interprets_loops

from alps_exp.patterns import parse_sparsity, transposing

pytest.importorskip("triton", reason="Triton is not installed")
from alps_exp.numerics import tile_kernels

cuda = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not cuda and os.environ.get("TRITON_INTERPRET") != "1", reason="neither CUDA nor TRITON_INTERPRET=1"
)
DEVICE = torch.device("cuda" if cuda else "cpu")
looping = pytest.mark.skipif(
    not cuda and not interprets_loops(),
    reason="Triton before 3.7 interprets no loops to a bound given at run time under NumPy 2.4 and later",
)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("2:4T", (24, 44)),
        ("1:4T", (4, 8)),
        ("3:4T", (8, 4)),
        ("4:8>2:4", (7, 64)),
        ("1:2>5:8", (3, 32)),
        ("2:4>1:2", (40, 24)),
        pytest.param("64:2:8", (64, 16), marks=looping),
        pytest.param("5:1:6", (10, 12), marks=looping),
        pytest.param("4:3:10", (4, 20), marks=[pytest.mark.slow, looping]),
    ],
)
def test_a_step_equals_its_equations(text, shape):
    generator = torch.Generator(DEVICE).manual_seed(0)
    b, target, coin = (torch.randn(shape, generator=generator, device=DEVICE) for _ in range(3))
    b[:4, :4] = target[:4, :4] = 1.0  # ties: the first choice wins
    support, change = coin > 0, torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    former = target * support
    new = b + (target - former) * 0.8
    pattern = parse_sparsity(text)
    expected = pattern.keep(new.abs())
    assert pattern.tracker().fast
    step = pattern.tracker().step(DEVICE, [shape[0]])
    if text == "2:4T":  # without the faster kernel, which takes any of equal masks
        step = partial(tile_kernels.masks_step, masks=transposing._bits(4, 2).to(DEVICE))
    step(b, target, support, 0.8, 0.3, change)
    assert torch.equal(support, expected)
    torch.testing.assert_close(target, new)
    torch.testing.assert_close(change.float(), 0.3 * (2 * new * expected - b - former), rtol=1e-2, atol=1e-2)


def test_pairs_of_rows_find_each_of_the_masks():
    masks = transposing.all_masks(4, 2).float().to(DEVICE)
    b = (masks.permute(1, 0, 2).reshape(4, -1) + 0.5).contiguous()
    target, support = torch.zeros_like(b), torch.zeros_like(b, dtype=torch.bool)
    change = torch.empty_like(b, dtype=torch.bfloat16)
    tile_kernels.pairs_step(b, target, support, 1.0, 1.0, change)
    assert masks.shape[0] == 90 and torch.equal(support, b > 1)


def test_pairs_of_rows_keep_the_most_energy():
    generator = torch.Generator(DEVICE).manual_seed(1)
    b, target, coin = (torch.randn(2, 24, 44, generator=generator, device=DEVICE) for _ in range(3))
    support, change = coin > 0, torch.empty(2, 24, 44, dtype=torch.bfloat16, device=DEVICE)
    former = target * support
    new = b + (target - former) * 0.8
    tile_kernels.pairs_step(b, target, support, 0.8, 0.3, change)
    pattern = parse_sparsity("2:4T")
    assert torch.equal(support, torch.stack([pattern.keep(part.abs()) for part in new]))
    torch.testing.assert_close(target, new)
    torch.testing.assert_close(change.float(), 0.3 * (2 * new * support - b - former), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("text", "shape"), [("block=8x4@0.7", (48, 40)), ("block=32@0.5", (96, 64))])
def test_blocks_of_each_layer_compete_among_themselves(text, shape):
    generator = torch.Generator(DEVICE).manual_seed(0)
    b, target, coin = (torch.randn(shape, generator=generator, device=DEVICE) for _ in range(3))
    b[: shape[0] // 3] *= 10  # a layer of its own
    support, change = coin > 0, torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    former = target * support
    new, heights = b + (target - former) * 0.8, [shape[0] // 3, shape[0] - shape[0] // 3]
    pattern = parse_sparsity(text)
    pattern.tracker().step(DEVICE, heights)(b, target, support, 0.8, 0.3, change)
    expected = torch.cat([pattern.keep(part.abs()) for part in new.split(heights)])
    assert torch.equal(support, expected)
    torch.testing.assert_close(target, new)
    torch.testing.assert_close(change.float(), 0.3 * (2 * new * expected - b - former), rtol=1e-2, atol=1e-2)


@looping
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "width", "down", "across"), [(2, 8, 2, 3), pytest.param(5, 16, 1, 2, marks=pytest.mark.slow)]
)
def test_exchanges_equal_those_of_torch(kept, width, down, across):
    shape = down * width, across * width
    energy = torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE).square()
    tiles = transposing._tiles(energy, width)
    mask = transposing._start(width, kept, 1).to(DEVICE).expand_as(tiles).clone()
    found = transposing._untiled(mask, shape).contiguous()
    transposing._exchange(tiles, mask)
    tile_kernels.exchange(energy, found, width, transposing._pairs(width).to(DEVICE))
    assert torch.equal(transposing._tiles(found, width), mask)
    assert (mask.sum(1) == kept).all() and (mask.sum(2) == kept).all()


@looping
@pytest.mark.slow
@pytest.mark.parametrize("text", ["4:8T"])
def test_steps_of_larger_tiles_go_on_from_the_last_support(text):
    pattern, generator = parse_sparsity(text), torch.Generator(DEVICE).manual_seed(2)
    b = torch.randn(16, 24, generator=generator, device=DEVICE)
    target, support = b.clone(), pattern.keep(torch.rand(16, 24, generator=generator, device=DEVICE))
    change, former = torch.empty_like(b, dtype=torch.bfloat16), target * support
    best = pattern.keep(b.abs())
    for _ in range(3):  # with a scale of 0, what is selected from is B
        held = target * support
        pattern.tracker().step(DEVICE, [len(b)])(b, target, support, 0.0, 0.3, change)
        assert pattern.holds(support) and int(support.sum()) == int(best.sum())
        torch.testing.assert_close(change.float(), 0.3 * (2 * b * support - b - held), rtol=1e-2, atol=1e-2)
    assert (b * support).square().sum() > 0.98 * (b * best).square().sum() > former.square().sum()
    assert torch.equal(target, b)


def test_layers_in_a_stack_are_selected_in_one_pass():
    """Groups of two layers of 8 and 4 outputs each, as ALPS stacks layers that share an input."""
    generator = torch.Generator(DEVICE).manual_seed(3)
    b, target = (torch.randn(2, 12, 16, generator=generator, device=DEVICE) for _ in range(2))
    support, change = torch.zeros_like(b, dtype=torch.bool), torch.empty_like(b, dtype=torch.bfloat16)
    pattern = parse_sparsity("2:4T")
    pattern.tracker().step(DEVICE, [len(b)])(b, target, support, 0.0, 0.3, change)
    for group, rows in ((0, slice(0, 8)), (0, slice(8, 12)), (1, slice(0, 8)), (1, slice(8, 12))):
        assert torch.equal(support[group, rows], pattern.keep(b[group, rows].abs()))


def test_what_has_no_pass_says_so():
    for text in ("2:3T", "5:10T", "2:3>2:4", "512:2:16", "3:5", "block=12@0.5", "row@0.5"):
        tracker = parse_sparsity(text).tracker()
        assert not tracker.fast and tracker.step(DEVICE, [8]) is None
