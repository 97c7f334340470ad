import re
import shutil

import pytest
from tiny import words_for

from alps_exp.base.errors import UserError
from alps_exp.cli import command
from alps_exp.cli.overrides import compose
from alps_exp.cli.plan import plan
from alps_exp.runs.settings import resolve


def plan_of(words: list[str]) -> str:
    return plan(resolve(compose(words)))


@pytest.fixture
def settings(tiny_llama, text_file) -> list[str]:
    return words_for(tiny_llama, text_file, "nsamples=8", "seqlen=64", "eval.windows=2")


def test_a_plan_names_layers_time_and_memory(settings):
    text = plan_of([*settings, "sparsity=2:4", "layers.exclude=[k_proj]", "save=true"])
    assert "12 of 14 linear layers" in text
    lines = {line.split()[2]: line.split() for line in text.splitlines() if " × " in line}
    assert lines["k_proj"][-1] == "dense" and lines["down_proj"][-1] == "2:4"
    assert lines["down_proj"][0] == "2" and lines["down_proj"][3:6] == ["64", "×", "160"]
    for word in ("time", "device", "host", "disk"):
        assert any(line.startswith(word) for line in text.splitlines()), word
    assert "the saved model" in text and "8 windows of 64" in text


def test_methods_that_need_less_are_planned_with_less(settings):
    magnitude = plan_of([*settings, "method=magnitude", "losses=false"])
    assert "forward passes 0 s" in magnitude and "Gram matrices 0 s" in magnitude


def test_a_plan_says_that_the_choice_of_a_strength_is_not_in_its_time(settings):
    auto, number = (
        plan_of([*settings, "target=stream", "data.holdout=4", f"target.strength={v}"]) for v in ("auto", 0.5)
    )
    assert "choosing target.strength not in it" in auto and "choosing target.strength" not in number


@pytest.mark.parametrize("refit", ["none", "pcg"])
def test_a_plan_says_that_swaps_are_not_in_its_time(settings, refit):
    """Their number is not known before, and they are bound by memory, not by products, whose rate is measured."""
    swapping, scoring = (plan_of([*settings, f"method={name}", f"refit={refit}"]) for name in ("sparseswaps", "wanda"))
    assert "swaps not in it" in swapping and "not in it" not in scoring.partition("\ntime")[2].partition("\n")[0]


def test_a_plan_is_validated(settings):
    with pytest.raises(UserError, match="beyond the model's context"):
        plan_of([*settings, "seqlen=1000"])


@pytest.mark.slow
def test_a_plan_counts_what_is_streamed_and_kept(settings):
    whole = plan_of([*settings, "stream=false", "resumable=false"])
    assert "for the model" in whole and "less than 1 MB for the record" in whole
    streamed = plan_of([*settings, "stream=true", "save=true", "hidden_states=disk"])
    assert "three blocks and what lies outside them" in streamed
    assert "finished blocks (they become the saved model)" in streamed and "hidden states while it runs" in streamed


@pytest.mark.slow
def test_a_plan_of_a_packed_model_counts_both_of_its_forms(settings):
    def saved(text):
        line = next(line for line in text.splitlines() if line.startswith("disk"))
        return {what: float(size) for size, what in re.findall(r"(\d+) MB for ([^,]+)", line)}

    settings = [*settings, "resumable=false", "sparsity=0.7"]
    dense, packed = (saved(plan_of([*settings, f"save={form}"])) for form in ("true", "packed"))
    assert packed["its dense form while it is packed"] == dense["the saved model"] > packed["the saved model"]


@pytest.mark.slow
def test_a_plan_tells_what_finishing_takes(settings):
    settings = [*settings, "sparsity=0.7", "data.holdout=2"]
    plain, block = plan_of(settings), plan_of([*settings, "finish=block"])
    distil = plan_of([*settings, "finish=distil"])
    assert "finishing" not in plain and "distillation" not in plain
    assert "finishing" in block and "distillation" not in block
    assert re.search(r"at least \d+ MB on the host for the distillation of the whole model", distil)
    assert "the distillation's checkpoint while it runs" in distil


@pytest.mark.parametrize(
    "more", ["method=magnitude losses=false data.holdout=2 finish=distil", "method=elsa method.steps=9"]
)
def test_on_a_cpu_the_host_has_what_training_the_model_takes(settings, more):
    text = plan_of([*settings, "sparsity=0.7", "seqlen=256", "nsamples=2", *more.split()])
    training = int(re.search(r"at least (\d+) MB on the host for the (distillation|training)", text)[1])
    assert int(re.search(r"host       about (\d+) MB", text)[1]) >= training > 2


@pytest.mark.slow
def test_a_plan_of_fresh_text_refuses_what_the_run_would(settings, tmp_path, capsys):
    settings = [*settings, "sparsity=0.7", "data.holdout=2", "finish=distil"]
    assert "32 windows of fresh text to train on (data=local)" in plan_of([*settings, "finish.tokens=2000"])
    (tmp_path / "short.txt").write_text("A few words. " * 100, encoding="utf-8")
    short = [*settings, "finish.tokens=90000", f"finish.path={tmp_path / 'short.txt'}"]
    with pytest.raises(UserError, match=r"finish.data=local: the text has only \d+ windows .* 1407 were asked"):
        plan_of(short)
    words = ["-m", *short, "method=wanda,magnitude", "plan=true", f"hydra.sweep.dir={tmp_path}"]
    assert command.guarded(lambda: command.command(words)) == 2
    assert (
        "1407 were asked; lower finish.tokens, or give a longer text (run tiny_llama-wanda-" in capsys.readouterr().err
    )
    elsewhere = plan_of([*settings, "finish.tokens=90000", "finish.data=c4"])
    assert "(whether data=c4, which is not on this machine yet, has so much text, the run will see)" in elsewhere


@pytest.mark.slow
def test_a_plan_keeps_to_the_minutes_of_finishing(settings, monkeypatch):
    monkeypatch.setattr("alps_exp.cli.plan._measured_rate", lambda device: 1e3)  # operations per second
    settings = [*settings, "sparsity=0.7", "data.holdout=2", "finish=[block,distil]"]
    assert "finishing blocks 10 min, distilling 10 min" in plan_of([*settings, "finish.minutes=20"])
    own = plan_of([*settings, "finish.block.minutes=3", "finish.distil.minutes=4"])
    assert "finishing blocks 3 min, distilling 4 min" in own
    assert "finishing blocks 10 min, distilling 5 min" in plan_of(
        [*settings, "finish.minutes=20", "finish.distil.minutes=5"]
    )


@pytest.mark.slow
def test_a_plan_of_a_sweep_is_one_table(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = [*settings, "method=magnitude", "sparsity=0.5", "hydra.run.dir=${hydra.sweep.dir}/${run_name:}"]
    assert command.guarded(lambda: command.command([*done, "save=true"])) == 0
    capsys.readouterr()
    words = ["-m", *settings, "method=magnitude,wanda", "sparsity=0.5", "save=true", "plan=true"]
    assert command.guarded(lambda: command.command(words)) == 0
    head, first, second, _, *rest = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "time", "disk"]
    assert first.startswith("tiny_llama-magnitude-u0.5-s0-") and first.endswith("  complete")
    assert second.startswith("tiny_llama-wanda-u0.5-s0-") and "  to run  " in second and second.endswith(" MB")
    assert rest[0] == "2 runs: 1 complete, 1 to run"
    assert rest[1].startswith("time: about ") and rest[2].startswith("disk: ") and " free in " in rest[2]
    assert len(rest) == 3
    nearly_full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: nearly_full)
    assert command.guarded(lambda: command.command(words)) == 0
    assert "\nwarning: the disk will not hold it: make " in capsys.readouterr().out
