"""The Triton kernels against the same passes in torch: on CUDA, or in Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch
from helpers import planted

from alps_exp.baselines import sparsegpt, sparseswaps
from alps_exp.calibration.capture import Accumulator
from alps_exp.layer import registry
from alps_exp.layer.inputs import Inputs
from alps_exp.layer.problem import LayerProblem, Statistics
from alps_exp.methods import alps, recorded
from alps_exp.numerics.kernels import kernel_for
from alps_exp.numerics.precision import Multiplier, eights, fast_products, quadratic, subtract_product
from alps_exp.patterns import parse_sparsity

triton = pytest.importorskip("triton", reason="Triton is not installed")
cuda = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not cuda and os.environ.get("TRITON_INTERPRET") != "1", reason="neither CUDA nor TRITON_INTERPRET=1"
)
needs_cuda = pytest.mark.skipif(not cuda, reason="needs CUDA")
DEVICE = torch.device("cuda" if cuda else "cpu")
LOW = torch.bfloat16


@pytest.fixture
def kernels():
    from alps_exp.numerics import triton_kernels

    return triton_kernels


def state(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    b, target, coin = (torch.randn(shape, generator=generator, device=DEVICE) for _ in range(3))
    return b, target, coin > 0


def reference(b, target, support, scale, rho, choose):
    """T, support and ρ(2D - B - D_former) by their equations."""
    former = target * support
    new = b + (target - former) * scale
    chosen = choose(new.abs())
    return new, chosen, rho * (2 * new * chosen - b - former)


def check(found, expected):
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(found[2].float(), expected[2], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(40, 96), (33, 65), (1, 1), (70, 1024)])
def test_threshold_step(kernels, shape):
    b, target, support = state(shape)
    expected = reference(b, target, support, 0.8, 0.3, lambda score: score >= 0.7)
    change = torch.empty_like(b, dtype=LOW)
    kept = kernels.threshold_step(b, target, support, 0.8, 0.3, change, torch.tensor(0.7, device=DEVICE))
    check((target, support, change), expected)
    assert int(kept) == int(support.sum())


@pytest.mark.parametrize("written", ["1:2", "1:4", "2:4", "4:8", "3:16"])
@pytest.mark.parametrize("shape", [(40, 96), (33, 64), (1, 16)])
def test_group_step(kernels, shape, written):
    b, target, support = state(shape)
    b[0, :8] = target[0, :8] = 1.0  # ties: the first entries win
    pattern = parse_sparsity(written)
    expected = reference(b, target, support, 0.8, 0.3, pattern.keep)
    change = torch.empty_like(b, dtype=LOW)
    kernels.group_step(b, target, support, 0.8, 0.3, change, pattern.tracker().group)
    check((target, support, change), expected)


@pytest.mark.parametrize("written", [None, "2:4", "4:8", "1:4"])
@pytest.mark.parametrize(
    ("columns", "out", "transposed"), [(64, 70, False), (16, 64, True), (24, 1, True), (8, 200, False)]
)
def test_sweep_step(kernels, columns, out, written, transposed):
    generator = torch.Generator(DEVICE).manual_seed(1)
    factor = torch.randn(72, 72, generator=generator, device=DEVICE).triu(1) / 8 + torch.eye(72, device=DEVICE)
    factor = factor.T.contiguous().T if transposed else factor
    factor = factor[5 : 5 + columns, 5 : 5 + columns]
    work = torch.randn(columns, out, generator=generator, device=DEVICE)
    keep = torch.rand(columns, out, generator=generator, device=DEVICE) < 0.4
    pattern = parse_sparsity(written or 0.6)

    expected_work, expected_keep, expected_errors = work.double(), keep.clone(), torch.zeros_like(work).double()
    for column in range(columns):
        if written and column % pattern.group == 0:
            chosen = slice(column, column + pattern.group)
            score = (expected_work[chosen] / factor.diagonal()[chosen, None]).square().T
            expected_keep[chosen] = pattern.keep(score.contiguous()).T
        error = expected_work[column] / factor[column, column] * ~expected_keep[column]
        expected_errors[column] = error
        expected_work[column + 1 :] -= factor[column, column + 1 :, None].double() * error

    errors = torch.empty_like(work)
    kernels.sweep_step(work, keep, factor, errors, pattern.tracker().group if written else None)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(work.double(), expected_work, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(errors.double(), expected_errors, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("written", [None, "2:4"])
def test_sweep_steps_of_several_layers_are_those_of_each(kernels, written):
    generator = torch.Generator(DEVICE).manual_seed(1)
    every = torch.randn(3, 40, 70, generator=generator, device=DEVICE)
    factor = torch.randn(3, 40, 40, generator=generator, device=DEVICE).triu(1) / 8 + torch.eye(40, device=DEVICE)
    keep = torch.rand(3, 40, 70, generator=generator, device=DEVICE) < 0.4
    here, group = slice(8, 24), parse_sparsity(written).tracker().group if written else None
    errors = torch.empty_like(every)
    expected = []
    for layer in range(3):
        own = [every[layer, here].clone(), keep[layer, here].clone(), factor[layer, here, here], torch.empty(16, 70)]
        own[3] = own[3].to(DEVICE)
        kernels.sweep_step(*own, group)
        expected.append(own)
    parts = (every[:, here], keep[:, here], factor[:, here, here], errors[:, here])
    kernels.sweep_step(*parts, group)
    for found, wanted in zip(parts, zip(*expected, strict=True), strict=True):
        assert torch.equal(found, torch.stack(wanted))


def test_combine(kernels):
    generator = torch.Generator(DEVICE).manual_seed(2)
    parts = [torch.randn(37, 41, generator=generator, device=DEVICE) for _ in range(4)]
    weights = [0.3, -0.2, 1.4, -0.5]
    low = kernels.combine(parts, weights, LOW)
    full = sum(w * part for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(low.float(), full, rtol=1e-2, atol=1e-2)
    halved = kernels.combine([part.half() for part in parts], weights, torch.float16)
    torch.testing.assert_close(halved.float(), full, rtol=1e-3, atol=1e-2)


@needs_cuda
def test_what_rounding_leaves_over_goes_with_the_next_change(kernels):
    changes = torch.randn(6, 100, 100, generator=torch.Generator(DEVICE).manual_seed(3), device=DEVICE).mul(20).half()
    rest, total = torch.zeros_like(changes[0]), 0
    for change in changes:
        eight = torch.empty_like(change, dtype=torch.float8_e4m3fn)
        kernels.rounded(change, rest, eight, 8.0)  # some are too large
        total = total + eight.float() / 8
    wanted = changes.float().sum(0)
    torch.testing.assert_close(total + rest.float(), wanted, rtol=0, atol=0.02)
    # A single change deviates by up to 4, and by more where it is beyond the largest number, 448 / 8.
    assert float(((total - wanted).abs() > 5).float().mean()) < 0.01


@needs_cuda
def test_forms_and_sums_from_split_products_are_nearly_those_of_float32():
    generator = torch.Generator(DEVICE).manual_seed(4)
    left = torch.randn(40, 5000, generator=generator, device=DEVICE)
    x = torch.randn(300, 5000, generator=generator, device=DEVICE) + 1
    matrix = x.T @ x
    exact = float(((left.double() @ matrix.double()) * left.double()).sum())
    assert quadratic(left, matrix) == pytest.approx(exact, rel=1e-5)
    base = torch.randn(2100, 2100, generator=generator, device=DEVICE)
    few, other = torch.randn(2100, 128, generator=generator, device=DEVICE), left.new_ones(128, 2100) * 3
    exact = base.double() - few.double() @ other.double()
    subtract_product(base, few, other)
    assert float((base - exact).abs().max()) < 1e-3


@needs_cuda
@pytest.mark.parametrize("written", ["0.7", "2:4", "2:4T"])
def test_recorded_iterations_are_those_that_are_made(written):
    problems = []
    for seed in range(4):
        made = planted(rows=288, width=256, tokens=1500, seed=seed, dtype=torch.float32)
        problems.append(LayerProblem(made.weight.to(DEVICE), Inputs(gram=made.gram.to(DEVICE))))
    pattern, solver = parse_sparsity(written), registry.solver("alps")
    wanted = []
    for problem in problems:
        recorded.forget()
        wanted.append(solver.solve(problem, pattern))
    recorded.forget()
    found = [solver.solve(problem, pattern) for problem in problems]
    assert recorded.kept() == 1
    for problem, one, other in zip(problems, found, wanted, strict=True):
        assert one.iterations == other.iterations and one.stats["rho"] == other.stats["rho"]
        assert problem.relative_loss(one.weight) == pytest.approx(problem.relative_loss(other.weight), rel=1e-3)
    recorded.forget()


@needs_cuda
def test_split_products_are_nearly_those_of_float32():
    generator = torch.Generator(DEVICE).manual_seed(3)
    left, matrix = (torch.randn(512, 512, generator=generator, device=DEVICE) + 5 for _ in range(2))
    exact = left.double() @ matrix.double()

    def error(found: torch.Tensor) -> float:
        return float((found.double() - exact).abs().max() / exact.abs().max())

    with fast_products(DEVICE):
        tf32 = error(left @ matrix)
    assert error(Multiplier(matrix)(left)) < 1e-5 < 3e-5 < tf32
    assert torch.equal(Multiplier(matrix, exact=True)(left), left @ matrix)


def on(problem: LayerProblem, device: torch.device, dtype: torch.dtype) -> LayerProblem:
    return LayerProblem(problem.weight.to(device, dtype), Inputs(gram=problem.gram.to(device, dtype)))


# Large enough (more than 2²⁰ weights) for the sampled threshold on CUDA.
@needs_cuda
@pytest.mark.parametrize("inputs", [1024, 1 << 20], ids=["float8", "float16"])
@pytest.mark.parametrize("written", ["0.5", "0.7", "0.9", "2:4", "4:8"])
def test_alps_with_all_shortcuts_loses_what_it_loses_in_float64(written, inputs, monkeypatch):
    monkeypatch.setattr(alps, "_EIGHT_INPUTS", inputs)
    assert eights(DEVICE) or torch.cuda.get_device_capability() < (8, 9)
    pattern = parse_sparsity(written)
    problem = planted(rows=1200, width=1024, tokens=6000, seed=4)
    found = registry.solver("alps").solve(on(problem, DEVICE, torch.float32), pattern)
    exact = registry.solver("alps").solve(on(problem, DEVICE, torch.float64), pattern)
    assert kernel_for(DEVICE, "combine") is not None
    assert int(found.support.sum()) == int(exact.support.sum())
    losses = [problem.relative_loss(solution.weight.cpu()) for solution in (found, exact)]
    assert 0.995 < losses[0] / losses[1] < 1.002


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gram_matrix_from_half_precision_inputs_loses_nothing(dtype):
    generator = torch.Generator(DEVICE).manual_seed(6)
    mixing = torch.randn(128, 512, generator=generator, device=DEVICE)
    noise = torch.randn(4, 2048, 512, generator=generator, device=DEVICE)
    x = (torch.randn(4, 2048, 128, generator=generator, device=DEVICE) @ mixing / 8 + 0.5 * noise + 0.3).to(dtype)
    weight = torch.randn(384, 512, generator=generator, device=DEVICE)
    accumulator = Accumulator(512, Statistics.GRAM, DEVICE)
    for window in x.split(1):
        accumulator.add(window)
    flat = x.reshape(-1, 512).double()
    exact = LayerProblem(weight.double(), Inputs(gram=flat.T @ flat))
    found = LayerProblem(weight, accumulator.inputs("one"))
    torch.testing.assert_close(found.gram.double(), exact.gram, rtol=1e-4, atol=1e-4 * float(exact.diagonal.mean()))
    losses = [
        exact.relative_loss(registry.solver("alps", exact=True).solve(problem, parse_sparsity("0.7")).weight.double())
        for problem in (found, exact)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@needs_cuda
@pytest.mark.parametrize("written", ["0.5", "0.7", "2:4", "4:8", "1:4"])
def test_sparsegpt_with_and_without_kernels(written, monkeypatch):
    pattern = parse_sparsity(written)
    problem = planted(rows=300, width=700 // 8 * 8, tokens=3000, seed=5)
    fused = registry.solver("sparsegpt").solve(on(problem, DEVICE, torch.float32), pattern)
    exact = registry.solver("sparsegpt").solve(on(problem, DEVICE, torch.float64), pattern)
    monkeypatch.setattr(sparsegpt, "kernel_for", lambda device, name: None)
    plain = registry.solver("sparsegpt").solve(on(problem, DEVICE, torch.float32), pattern)
    losses = [problem.relative_loss(solution.weight.cpu()) for solution in (fused, plain, exact)]
    assert losses == pytest.approx([losses[2]] * 3, rel=2e-3)


@pytest.mark.parametrize(("shape", "stride"), [((40, 96), 1), ((33, 65), 3), ((1, 1), 1), ((300, 320), 7)])
@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_sampled_threshold(kernels, shape, stride, sparsity):
    b, target, support = state(shape)
    sample = reference(b, target, support, 0.8, 0.3, lambda score: score)[0].abs().view(-1)[::stride]
    segments = kernels.Segments([b.numel()], [sparsity], [stride], DEVICE)
    segments.ranks[1] += 2.0
    segments.kept += 3 * stride
    found = kernels.sampled_threshold(b, target, support, 0.8, segments)
    assert (
        float(segments.ranks[1]) == 5.0
    )  # three entries of the sample too many were kept, beside what was known before
    assert int(segments.kept) == 0
    rank = min(int(sparsity * len(sample) + 5.0), len(sample) - 1)
    torch.testing.assert_close(found, sample.sort().values[[rank]])


def test_layers_of_one_state_have_thresholds_of_their_own(kernels):
    b, target, support = state((70, 96))
    rows, sparsities, strides = [30, 1, 39], [0.3, 0.9, 0.6], [3, 1, 5]
    segments = kernels.Segments([96 * n for n in rows], sparsities, strides, DEVICE)
    assert segments.kept.tolist() == [round((1 - s) * 96 * n) for s, n in zip(sparsities, rows, strict=True)]
    threshold = kernels.sampled_threshold(b, target, support, 0.8, segments)
    own = [part.split(rows) for part in (b, target, support)]
    expected = []
    for layer, parts in enumerate(zip(*own, strict=True)):
        score = reference(*parts, 0.8, 0.3, lambda score: score)[0].abs()
        sample = score.reshape(-1)[:: strides[layer]].sort().values
        assert float(threshold[layer]) == pytest.approx(float(sample[int(sparsities[layer] * len(sample))]))
        above = int((sample >= float(threshold[layer])).sum())
        assert 0 <= above - (1 - sparsities[layer]) * len(sample) < 1, "the quantile, and never an entry too few"
        expected.append(reference(*parts, 0.8, 0.3, lambda score, at=float(threshold[layer]): score >= at))
    change = torch.empty_like(b, dtype=LOW)
    kept = kernels.threshold_step(b, target, support, 0.8, 0.3, change, threshold, segments)
    check((target, support, change), [torch.cat(parts) for parts in zip(*expected, strict=True)])
    assert kept.tolist() == [int(part.sum()) for part in support.split(rows)]


@needs_cuda
def test_a_small_layer_keeps_about_its_count_in_every_iteration(kernels):
    pattern = parse_sparsity("0.7")
    generator = torch.Generator("cuda").manual_seed(0)
    tracker = pattern.tracker()
    b = torch.randn(576, 576, device="cuda", generator=generator)
    stride, wanted = tracker.stride(b), tracker.count(b.numel())
    segments = kernels.Segments([b.numel()], [0.7], [stride], b.device)
    target, support, change = b.clone(), torch.ones_like(b, dtype=torch.bool), torch.empty_like(b, dtype=LOW)
    excess = 0
    for _ in range(8):
        threshold = kernels.sampled_threshold(b, target, support, 1.0, segments)
        kept = int(kernels.threshold_step(b, target, support, 1.0, 0.3, change, threshold, segments))
        assert kept == int(support.sum())
        # A sample's deviation is 1.2 %. What one keeps too many the next rank makes good, beside its own deviation:
        # single excesses deviate by 2.2 %, and their sum does not grow.
        excess += kept - wanted
        assert abs(kept - wanted) < 0.08 * wanted and abs(excess) < 0.08 * wanted
        b = b + 0.01 * torch.randn(576, 576, device="cuda", generator=generator)


@pytest.mark.parametrize("shape", [(5, 40), (3, 300)])
def test_best_pairs(kernels, shape):
    generator = torch.Generator(DEVICE).manual_seed(0)
    width = shape[1]
    x = torch.randn(2 * width, width, generator=generator, device=DEVICE)
    gram = x.T @ x / (2 * width)
    s = torch.randn(shape, generator=generator, device=DEVICE)
    kept = torch.rand(shape, generator=generator, device=DEVICE) < 0.5
    kept[0] = True  # nothing to regrow: no pair
    product = 2 * s * (s.masked_fill(kept, 0) @ gram)
    regrow = (s.square() - product).masked_fill(kept, torch.inf)
    prune = (s.square() + product).masked_fill(~kept, torch.inf)
    change = regrow[:, :, None] + prune[:, None, :] - 2 * s[:, :, None] * s[:, None, :] * gram
    expected, place = change.flatten(1).min(dim=1)
    pairs = sparseswaps._Pairs(gram)
    best, p, k = kernels.best_pairs(pairs._gram, s, regrow, prune, pairs._bounds(s, regrow, prune))
    torch.testing.assert_close(best, expected.clamp_max(0).nan_to_num(posinf=0))
    assert best[0] == 0 and (best[1:] < 0).all()
    assert torch.equal((p * width + k)[1:], place[1:])
