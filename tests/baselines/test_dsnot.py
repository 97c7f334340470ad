"""DSnoT swap by swap against a row-by-row reference in plain Python."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import assert_exact, planted

from alps_exp.base.errors import UserError
from alps_exp.layer import registry
from alps_exp.layer.inputs import Inputs
from alps_exp.layer.problem import LayerProblem, Statistics
from alps_exp.patterns import parse_sparsity


def start_scores(problem: LayerProblem, start: str, row: int) -> list[float]:
    weight = problem.weight[row].tolist()
    if start == "magnitude":
        return [abs(w) for w in weight]
    if start == "wanda":
        return [abs(w) * g**0.5 for w, g in zip(weight, problem.diagonal.tolist(), strict=True)]
    damped = problem.gram + 0.01 * problem.gram.diagonal().mean() * torch.eye(len(problem.gram), dtype=torch.float64)
    damped[problem.dead, problem.dead] = 1
    u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).diagonal().tolist()
    return [0 if dead else (w / d) ** 2 for w, d, dead in zip(weight, u, problem.dead.tolist(), strict=True)]


def first_kept(score: list[float], written: str) -> set[int]:
    """The kept inputs of one row at the start."""
    width = len(score)
    kept, group = (
        map(int, written.split(":")) if ":" in written else (width - int(float(written) * width + 1e-9), width)
    )
    chosen = set()
    for begin in range(0, width, group):
        chosen |= set(sorted(range(begin, begin + group), key=lambda j: -score[j])[:kept])
    return chosen


def reference_row(problem: LayerProblem, row: int, written: str, start: str, same_sign: bool, max_swaps: int, p: float):
    """The kept inputs of one row and its swaps [(regrown, pruned)], by the equations."""
    weight = problem.weight[row].tolist()
    width, counts = len(weight), problem.tokens / problem.sequences
    a = [w * m * counts for w, m in zip(weight, problem.mean.tolist(), strict=True)]
    ratio = [x / v**p if x else 0 for x, v in zip(a, problem.var.tolist(), strict=True)]
    wanda, score = start_scores(problem, "wanda", row), start_scores(problem, start, row)
    kept = first_kept(score, written)
    may_regrow, may_prune = set(range(width)) - kept, set(kept)
    error = sum(a[j] for j in may_regrow)
    sign, swaps = (1 if error > 0 else -1), []
    while len(swaps) < max_swaps and abs(error) > 0.1 and may_regrow:
        # Equal ratios (those of dead inputs are 0): the row's order from the end that the sign takes from.
        regrow = (max if error > 0 else min)(may_regrow, key=lambda j: (ratio[j], -j))
        if ":" in written:
            group = int(written.split(":")[1])
            choice = [j for j in may_prune if j // group == regrow // group]
            if not choice:
                may_regrow.remove(regrow)
                continue
            prune = min(choice, key=lambda j: score[j])
        else:
            choice = [j for j in may_prune if a[j] * error < 0]
            if not choice:
                break
            prune = min(choice, key=lambda j: wanda[j])
        after = error + a[prune] - a[regrow]
        if same_sign and after * sign < 0:
            break
        may_regrow.remove(regrow)
        may_prune.remove(prune)
        kept ^= {regrow, prune}
        swaps.append((regrow, prune))
        error = after
    return kept, swaps


def assert_equals_reference(problem, written, start="wanda", same_sign=True, max_swaps=50, power=1.0) -> int:
    solver = registry.solver("dsnot", start=start, same_sign=same_sign, max_swaps=max_swaps, power=power)
    solution = solver.solve(problem, parse_sparsity(written))
    total, most = 0, 0
    for row in range(problem.weight.shape[0]):
        kept, swaps = reference_row(problem, row, written, start, same_sign, max_swaps, power)
        assert set(solution.support[row].nonzero().view(-1).tolist()) == kept, f"row {row}"
        total, most = total + len(swaps), max(most, len(swaps))
    assert solution.stats == {"start": start, "same_sign": same_sign, "swaps": total}
    assert solution.iterations == most
    assert torch.equal(solution.weight, torch.where(solution.support, problem.weight, 0.0))
    return total


@pytest.mark.parametrize("same_sign", [True, False])
@pytest.mark.parametrize("written", ["0.3", "0.5", "0.8", "0.95", "2:4", "4:8", "1:4", "3:4", "5:12"])
def test_every_swap_equals_the_reference(written, same_sign):
    problem = planted(rows=16, width=96, seed=30)
    totals = [assert_equals_reference(problem, written, same_sign=same_sign, max_swaps=k) for k in range(8)]
    totals.append(assert_equals_reference(problem, written, same_sign=same_sign, max_swaps=50))
    assert totals[0] == 0
    assert totals[-1] > totals[1] > 0, "the layer must give something to swap"


@pytest.mark.parametrize("start", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize("written", ["0.6", "2:4", "1:4"])
def test_other_starts(start, written):
    problem = planted(rows=16, width=96, seed=31)
    assert assert_equals_reference(problem, written, start=start) > 0
    assert assert_equals_reference(problem, written, start=start, same_sign=False) > 0


@pytest.mark.parametrize("start", ["wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize("written", ["0.2", "0.6", "2:4"])
def test_dead_inputs_rank_as_zero(start, written):
    # Sum and variance vanish: a / V^p counts as 0, and such a weight is never pruned for its sign.
    problem = planted(rows=16, width=96, seed=35, dead=tuple(range(0, 96, 3)))
    for same_sign in (True, False):
        swaps = assert_equals_reference(problem, written, start=start, same_sign=same_sign)
        only_dead_are_pruned = written == "0.2" and start != "magnitude"
        assert (swaps == 0) is only_dead_are_pruned


@pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
def test_power_of_the_variance(power):
    assert assert_equals_reference(planted(rows=16, width=96, seed=32), "0.6", power=power) > 0


@pytest.mark.slow
def test_rows_run_out_of_candidates_without_losing_their_count():
    # 6 inputs: after a few swaps a row has none left of the right sign, or nothing left to regrow.
    for seed in range(10):
        problem = planted(rows=12, width=6, tokens=80, seed=seed)
        for written in ("0.5", "0.8", "1:3", "2:3"):
            for same_sign in (True, False):
                assert_equals_reference(problem, written, same_sign=same_sign)


@pytest.mark.parametrize("written", ["0.29", "0.7", "2:4", "1:4"])
@pytest.mark.parametrize("same_sign", [True, False])
def test_exact_counts_after_many_swaps_in_float32(written, same_sign):
    problem = planted(rows=40, width=100, seed=33, dtype=torch.float32)
    solution = registry.solver("dsnot", same_sign=same_sign, max_swaps=1000, threshold=0.0).solve(
        problem, parse_sparsity(written)
    )
    assert solution.stats["swaps"] > 20
    assert_exact(solution.support, parse_sparsity(written), written, "row")


def test_the_mean_of_the_outputs_comes_nearer():
    problem = planted(rows=32, width=96, seed=34)
    for written in ("0.5", "0.7"):
        errors = [
            ((problem.weight - registry.solver(m).solve(problem, parse_sparsity(written)).weight) @ problem.mean).abs()
            for m in ("wanda", "dsnot")
        ]
        assert (errors[1] <= errors[0] + 1e-12).all()
        assert errors[1].mean() < 0.5 * errors[0].mean()


@pytest.mark.parametrize("written", ["0.5", "2:4"])
def test_constant_and_dead_inputs(written):
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 0], x[:, 1], x[:, 5] = 2.0, 0.0, -1.0
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[:, 0] = 1e-3  # so small that Wanda prunes it
    problem = LayerProblem.from_inputs(weight, x, sequences=2)
    assert problem.var[[0, 1, 5]].tolist() == [0, 0, 0]
    pattern = parse_sparsity(written)
    before = registry.solver("wanda").solve(problem, pattern).support
    assert not before[:, 0].any()
    for same_sign in (True, False):
        solution = registry.solver("dsnot", same_sign=same_sign, threshold=0.0).solve(problem, pattern)
        assert torch.isfinite(solution.weight).all()
        assert_exact(solution.support, pattern, written, "row")
    # a = 0.04 and V = 0: nothing repairs a positive error at a smaller price, so it is the first to come back.
    once = registry.solver("dsnot", same_sign=False, threshold=0.0, max_swaps=1).solve(problem, pattern).support
    positive = ((weight * ~before) @ problem.mean > 0) & (once != before).any(1)
    assert positive.any()
    assert once[positive, 0].all()


def test_statistics_follow_the_start():
    assert registry.solver("dsnot").statistics is Statistics.MOMENTS
    assert registry.solver("dsnot", start="magnitude").statistics is Statistics.MOMENTS
    assert registry.solver("dsnot", start="sparsegpt").statistics is Statistics.ALL
    problem = planted()
    moments = LayerProblem(
        problem.weight, Inputs(diagonal=problem.diagonal, mean=problem.mean, var=problem.var, tokens=400, sequences=4)
    )
    with pytest.raises(UserError, match="gram="):
        registry.solver("dsnot", start="sparsegpt").solve(moments, parse_sparsity("0.5"))
    lacking = dataclasses.replace(moments, inputs=moments.inputs.replaced(tokens=None, sequences=None))
    with pytest.raises(UserError, match="tokens=, sequences="):
        registry.solver("dsnot").solve(lacking, parse_sparsity("0.5"))


@pytest.mark.parametrize("fields", [{"start": "alps"}, {"same_sign": "false"}, {"same_sign": 1}])
def test_refused_values(fields):
    with pytest.raises(UserError, match="is not allowed"):
        registry.solver("dsnot", **fields)
