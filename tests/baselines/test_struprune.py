"""The reconstruction of STRUPRUNE: its allocation, scores and fits against plain computation; runs and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import planted
from tiny import execute, load, random_tokens
from transformers import AutoModelForCausalLM

import alps_exp
from alps_exp import UserError
from alps_exp.baselines import sparsellm
from alps_exp.baselines.struprune import fitted, shares
from alps_exp.cli.overrides import compose
from alps_exp.methods.alternating import SILU
from alps_exp.runs.settings import resolve
from alps_exp.tables.figures import aggregate
from alps_exp.tables.footnotes import footnotes


def objective(p, energies, sizes, temperature) -> float:
    entropy = -sum(n * (q * np.log(q) + (1 - q) * np.log(1 - q)) for n, q in zip(sizes, p, strict=True))
    lost = sum(n * (1 - q) * e for n, q, e in zip(sizes, p, energies, strict=True))
    return lost - temperature * np.mean(energies) * entropy


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_shares_minimise_the_objective(temperature):
    energies, sizes, kept = [0.4, 1.0, 2.5], [9000, 12000, 6000], 16000
    counts = shares(energies, sizes, kept, temperature)
    found = [count / size for count, size in zip(counts, sizes, strict=True)]
    assert sum(counts) == kept and found == sorted(found)
    least = objective(found, energies, sizes, temperature)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        for moved in (-150, 150):  # units from one layer to another
            changed = list(counts)
            changed[one] += moved
            changed[other] -= moved
            share = [count / size for count, size in zip(changed, sizes, strict=True)]
            if all(0 < q < 1 for q in share):
                assert objective(share, energies, sizes, temperature) > least
    # The closed form: the log-odds differ as the energies over T.
    odds = [np.log(q / (1 - q)) * temperature * np.mean(energies) for q in found]
    assert np.ptp(np.array(odds) - energies) < 0.02


def test_shares_at_the_ends():
    assert shares([1.0, 2.0, 3.0], [10, 10, 10], 15, 1e6) == [5, 5, 5]
    assert shares([1.0, 2.0, 3.0], [10, 10, 10], 15, 1e-3) == [1, 4, 10]
    assert shares([0.0, 0.0], [4, 4], 3, 1.0) in ([1, 2], [2, 1])
    assert shares([1.0, 9.0], [2, 2], 4, 1.0) == [2, 2] and shares([1.0, 9.0], [2, 2], 2, 1.0) == [1, 1]


def test_a_layer_is_fitted_to_what_stays():
    problem = planted(rows=6, width=20, seed=3)
    stay = torch.arange(20) % 3 != 0
    gram, weight = problem.gram.numpy(), problem.weight.numpy()
    k = stay.nonzero().squeeze(1).numpy()
    expected = np.zeros_like(weight)
    expected[:, k] = np.linalg.solve(gram[np.ix_(k, k)], (gram @ weight.T)[k]).T
    np.testing.assert_allclose(fitted(problem.weight, problem.gram, stay, 0.0, []).numpy(), expected, atol=1e-9)


@pytest.mark.parametrize(("family", "writers"), [("opt", ("out_proj", "fc2")), ("llama", ("o_proj", "down_proj"))])
def test_the_units_of_largest_score_stay_and_are_fitted(request, family, writers):
    folder = request.getfixturevalue(f"tiny_{family}")
    model, dense = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    record = alps_exp.prune_model(
        model, random_tokens(4, 48), method="struprune", sparsity=0.5, rounds=1, temperature=0.5
    )
    seen = {}
    for name, module in dense.named_modules():
        if name.endswith(writers):
            module.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, args[0].detach()))
    with torch.no_grad():
        dense(random_tokens(4, 48))
    kept = {"heads": [], "channels": []}
    for row in record["layers"]:
        if not row["name"].endswith(writers):
            continue
        name, width = row["name"], row["shape"][1] // row["stats"]["units"]
        x = seen[name].reshape(-1, row["shape"][1]).double()
        weight = dense.get_submodule(name).weight.detach().double()
        score = (weight**2 * (x**2).sum(0)).sum(0).view(-1, width).sum(1)
        stay = (model.get_submodule(name).weight != 0).any(0).view(-1, width).any(1)
        assert int(stay.sum()) == row["stats"]["kept"] and row["stats"]["reconstruction"] is True
        assert float(score[stay].min()) > float(score[~stay].max())
        kept[row["stats"]["unit"]].append((float(score.mean()), row["stats"]["kept"], row["stats"]["units"]))
        if row["block"] == 0:  # whose heads see the dense inputs
            columns = stay.repeat_interleave(width).nonzero().squeeze(1)
            gram = x.T @ x
            scale = gram.diagonal().rsqrt()[columns]
            inner = gram[columns][:, columns] * scale * scale[:, None]
            inner += 1e-3 * torch.eye(len(columns), dtype=inner.dtype)
            gone = stay.repeat_interleave(width).logical_not().nonzero().squeeze(1)
            right = (weight[:, gone] @ gram[gone][:, columns]) * scale
            expected = weight[:, columns] + torch.linalg.solve(inner, right.T).T * scale
            assert torch.allclose(model.get_submodule(name).weight[:, columns].double(), expected, rtol=1e-3, atol=1e-4)
    for layers in kept.values():
        energies, counts, sizes = zip(*layers, strict=True)
        assert list(counts) == shares(energies, sizes, sum(sizes) // 2, 0.5)
    assert any("reconstruction" in warning for warning in record["warnings"])


def test_the_alternation_moves_weights_that_stay_and_no_others(tiny_llama):
    errors = []
    for rounds in (1, 4):
        model, dense = (AutoModelForCausalLM.from_pretrained(tiny_llama).eval() for _ in range(2))
        options = {"sparsity": 0.4, "include": ["layers.0.mlp.*"], "rounds": rounds}
        alps_exp.prune_model(model, random_tokens(4, 48), method="struprune", **options)
        part, before = model.model.layers[0].mlp, dense.model.layers[0].mlp
        stay = (part.down_proj.weight != 0).any(0)
        assert int(stay.sum()) == 96 and not part.up_proj.weight[~stay].any() and not part.gate_proj.weight[~stay].any()
        assert torch.equal(part.up_proj.weight[stay], before.up_proj.weight[stay]) == (rounds == 1)
        x = []
        before.register_forward_pre_hook(lambda module, args, x=x: x.append(args[0]))
        with torch.no_grad():
            dense(random_tokens(4, 48))
            one, other = part(x[0]), before(x[0])
        errors.append(float((one - other).square().sum() / other.square().sum()))
    assert errors[1] < 1.1 * errors[0] < 0.1, errors


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["true", "false"])
def test_runs_save_and_are_labelled(tiny, tmp_path, stream):
    words = [*tiny, "method=struprune", "sparsity=0.25", "method.rounds=2", "save=true"]
    record = execute([*words, f"stream={stream}"], tmp_path / stream)
    assert record["summary"]["removed"]["channels"] == 0.25 and record["warnings"]
    again = execute([*words, "resume=false", "stream=auto"], tmp_path / "other")
    one, other = (load(tmp_path / folder / "model") for folder in (stream, "other"))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    zero = sum(int((p == 0).all(0).sum()) for name, p in one.named_parameters() if name.endswith("fc2.weight"))
    assert zero == 2 * 64 and again["status"] == "complete"
    lines = footnotes(aggregate([record]), {}, ["relative loss"])
    assert any("struprune: a reconstruction, since" in line.lower() for line in lines)
    assert any("struprune: losses of the layers whose inputs left" in line.lower() for line in lines)


@pytest.mark.slow
def test_what_it_cannot_prune_is_refused(tiny, tiny_gemma3, monkeypatch):
    def asked(*words):
        return resolve(compose([*tiny, "method=struprune", "sparsity=0.25", *words]))

    assert asked(f"model.path={tiny_gemma3}").patterns
    monkeypatch.setattr(sparsellm, "ACTIVATIONS", (SILU,))
    with pytest.raises(UserError, match=r"gated with GELUTanh: choose another method, or give method.rounds=1"):
        asked(f"model.path={tiny_gemma3}")
    assert asked(f"model.path={tiny_gemma3}", "method.rounds=1").patterns
    with pytest.raises(UserError, match="leaves other numbers of channels and heads in every block"):
        asked("save=shrunk")
    with pytest.raises(UserError, match=r"method\.temperature"):
        asked("method.temperature=0")
    with pytest.raises(UserError, match="lose together what StruPrune takes away"):
        asked("allocation=owl")
