"""target.strength=auto: what is chosen, and that it is chosen once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from tiny import execute, load, network, tokens, weights, words_for

from alps_exp.allocation.prunable import linear_shapes
from alps_exp.allocation.selection import Selection
from alps_exp.base.errors import UserError
from alps_exp.cli.overrides import compose
from alps_exp.evaluation.perplexity import perplexity
from alps_exp.layer.registry import solver
from alps_exp.methods.target import StreamTarget
from alps_exp.model.blocks import BlockModel
from alps_exp.patterns import parse_sparsity
from alps_exp.procedure import strength
from alps_exp.pruning.block import BlockProblem
from alps_exp.pruning.job import PruneJob
from alps_exp.pruning.loop import BlockLoop
from alps_exp.pruning.stages import Solve, Stage
from alps_exp.runs.settings import resolve


@pytest.fixture
def settings(tiny_llama, text_file) -> list[str]:
    own = ["nsamples=20", "seqlen=64", "data.holdout=4", "eval=none", "save=true", "sparsity=0.7", "target=stream"]
    return words_for(tiny_llama, text_file, *own)


@pytest.mark.slow
def test_the_strength_of_the_smallest_held_out_loss_is_taken(settings, tmp_path, monkeypatch):
    windows = []
    tried = strength._tried
    monkeypatch.setattr(strength, "_tried", lambda model, job, method: windows.append(job) or tried(model, job, method))
    record = execute(settings, tmp_path / "auto", "target.strength=auto", "method=sparsegpt")
    found, job = record["strength"], windows[0]
    assert (found["windows"], found["held_out_windows"]) == (strength.WINDOWS, 4)
    losses = {float(value): loss for value, loss in found["held_out_loss"].items()}
    assert found["chosen"] == min(losses, key=losses.get)
    assert record["phases"]["strength_seconds"] > 0
    # What it tells of each strength is what a run of its own on those windows gives.
    from alps_exp.api import prune_model

    for value in strength.STRENGTHS:
        model = load(job_folder(settings))
        target = StreamTarget(value)
        prune_model(model, job.tokens[: strength.WINDOWS], "sparsegpt", "0.7", target=target, losses=False)
        loss = math.log(perplexity(BlockModel(model, torch.device("cpu")), job.held_out, quiet=True))
        assert losses[value] == pytest.approx(loss, rel=1e-6)
    # And the run itself is the one with that number.
    execute(settings, tmp_path / "number", f"target.strength={found['chosen']}", "method=sparsegpt")
    one, other = weights(tmp_path / "auto"), weights(tmp_path / "number")
    assert all(torch.equal(one[name], other[name]) for name in other)


def job_folder(settings: list[str]):
    return next(word for word in settings if word.startswith("model.path=")).split("=")[1].strip("'")


@pytest.mark.slow
def test_an_interrupted_run_does_not_choose_again(settings, tmp_path, monkeypatch):
    words = ["target.strength=auto", "method=wanda"]
    expected = execute(settings, tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        patch.setattr("alps_exp.procedure.prune.check_weights", lambda *args: None)
        patch.setattr("alps_exp.pruning.block.BlockProblem.finish", failing_after_the_choice(patch))
        with pytest.raises(RuntimeError, match="out of luck"):
            execute(settings, tmp_path / "run", *words)
    monkeypatch.setattr(strength, "_tried", lambda *args: pytest.fail("chosen again"))
    record = execute(settings, tmp_path / "run", *words)
    assert record["strength"] == expected["strength"]
    one, other = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in other)


def failing_after_the_choice(patch):
    from alps_exp.pruning.block import BlockProblem

    finish = BlockProblem.finish

    def failing(block):
        if type(block.tools.store).__name__ == "NoStore":
            return finish(block)
        raise RuntimeError("out of luck")

    return failing


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.holdout=0"], "give data.holdout"),
        (["devices=2", "nsamples=20"], "devices=2: give a number"),
        (["stream=true"], "block by block: give a number"),
        (["target.strength=best"], "target.strength"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_chosen_is_refused(settings, words, message):
    with pytest.raises(UserError, match=message):
        resolve(compose([*settings, "target.strength=auto", "method=wanda", *words]))


@dataclass(frozen=True)
class Spoiling(Stage):
    """Changes all that a block has."""

    def run(self, block: BlockProblem) -> None:
        with torch.no_grad():
            for parameter in block.module.parameters():
                parameter.mul_(0.9)


@pytest.mark.slow
def test_the_model_is_put_back_whole():
    """Biases and norms too, which a method may change beside the layers' weights."""
    model, dense = network("opt"), network("opt")
    selection = Selection()
    patterns = selection.patterns_for(linear_shapes(model, selection), parse_sparsity("0.5"))
    target = StreamTarget("auto")
    job = PruneJob(solver("wanda"), patterns, selection, tokens(), 4, held_out=tokens(2), quiet=True, target=target)
    lost = strength._tried(BlockModel(model, torch.device("cpu")), job, BlockLoop((Solve(), Spoiling())))
    assert set(lost["held_out_loss"]) == {"0.35", "0.5", "0.7"}
    for (name, parameter), wanted in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(parameter, wanted), name


def test_from_python_it_is_refused_without_held_out_windows(tiny_llama):
    from alps_exp.api import prune_model

    with pytest.raises(UserError, match="give held_out=TOKENS"):
        prune_model(load(tiny_llama), torch.ones(2, 8, dtype=torch.long), "wanda", "0.5", target=StreamTarget("auto"))
