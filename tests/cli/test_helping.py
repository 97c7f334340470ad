"""alps-exp help: every key, group and choice is explained, and --help is one screen."""

from __future__ import annotations

import pytest
import yaml
from helpers import ROOT
from tiny import FEW_WINDOWS, words_for

from alps_exp.cli import completion, helping
from alps_exp.cli.overrides import compose
from alps_exp.runs.settings import resolve
from alps_exp.runs.values import ROOT as VALUES


def told(word: str) -> str:
    return "\n".join(helping.explained(word))


def test_help_is_one_screen(capsys):
    assert helping.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for group in helping.groups_known():
        assert f"\n  {group} " in text
    for part in ("quick", "plan=true", "help KEY", "sparsegpt", "nsamples", "2:4", "--cfg job", "-sc install"):
        assert part in text


def test_all_groups_are_known():
    folders = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()} - {"hydra", "__pycache__"}
    assert set(helping.groups_known()) == folders | {"sweeps"}


def test_every_key_at_the_root_has_a_comment_and_says_what_it_takes():
    for name, key in helping._root().items():
        text = told(name)
        assert (key.comment and f"default: {key.default}" in text) or "." in name or name == "layers", name
        if name not in ("device", "resume", "push") and "." not in name and name != "layers":
            assert name in VALUES and f"takes:   {VALUES[name]}" in text and f"example: alps-exp {name}=" in text


def test_what_a_key_takes_is_what_the_checks_take():
    cfg = compose([])
    for name, values in VALUES.items():
        assert values.check(name, cfg[name]) is None  # the default
        values.check(name, yaml.safe_load(values.example(helping._root()[name].default)))
        with pytest.raises(ValueError, match=f"^{name}="):
            values.check(name, "nonsense")


def test_a_group_lists_its_choices_and_their_meaning():
    text = told("method")
    for name in helping.choices("method"):
        assert f"\n  {name} " in text
    assert "ADMM finds the support" in text and "default: alps" in text


@pytest.mark.slow
def test_sparsity_lists_every_pattern_with_an_example_that_composes():
    text = told("sparsity")
    for line in text.splitlines():
        if " sparsity=" in line and "alps-exp" not in line:
            name, value = line.split()[:2]
            assert compose([value]).sparsity.kind == name
    assert text.count(" sparsity=") >= len(helping.choices("sparsity")) + 1


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("method.rho", ["initial penalty", "a number above 0 up to 1e+06", "default: 0.1", "method=alps"]),
        ("rho", ["method.rho", "initial penalty"]),
        ("method.damping", ["method=osscar, sparsegpt:", "0.003 (alps), 0.01 (alps-paper)"]),
        ("target.strength", ["default: 0.5", "target=stream"]),
        ("finish.block.rate", ["learning rate", "default: 0.001"]),
        ("finish.tokens", ["finish=block, distil:", "takes:   a whole number from 1"]),
        ("finish.distil.precision", ["autocast", "takes:   auto, bfloat16, float32"]),
        ("eval.windows", ["Windows to evaluate", "default: null"]),
        ("data.join", ["What joins documents"]),
        ("model.path", ["OWNER/NAME on the hub"]),
        ("layers", ["Glob patterns", "layers.include"]),
        ("sparsity=2:4", ["64:2:8"]),
        ("wanda", ["method=wanda", "eval=wanda", "WikiText-2"]),
        ("method=wanda", ["largest |W|", "example: alps-exp method=wanda"]),
        ("+preset", ["residual", "left out by default: give +preset=CHOICE"]),
        ("sweeps=demo", ["every method at several sparsities", "alps-exp -m +sweeps=demo"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_told(word, parts):
    text = told(word)
    for part in parts:
        assert part in text, text


@pytest.mark.slow
def test_every_key_of_every_group_means_something():
    for key in helping._all_keys():
        lines = [line for line in told(key).splitlines() if line.startswith("  ")]
        said = [line for line in lines if not line.startswith(("  default:", "  takes:")) and not line.endswith(":")]
        assert said or key.startswith("sparsity."), key
    assert "finish=block" in told("finish.block")


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("nsample", "did you mean nsamples"),
        ("method.roh", "did you mean method.rho"),
        ("method=alsp", "unknown method 'alsp'; did you mean alps"),
        ("xyzzy", "nothing is called 'xyzzy'; give a group, a key or a choice"),
    ],
    ids=["key", "hyperparameter", "choice", "nothing"],
)
def test_what_is_unknown_is_answered_with_the_nearest_names(word, part, capsys):
    assert helping.main([word]) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1 and error.startswith("alps_exp: ")


@pytest.mark.slow
def test_the_page_of_keys_is_what_help_says():
    """Mend it with python -m alps_exp.cli.helping > docs/keys.md."""
    page = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    assert page == helping.page()
    for word in ("data.calibration_file", "data.evaluate_on", "model.gguf_file", "logger.entity", "finish.distil.rate"):
        assert f"\n| `{word}` |" in page


def test_every_key_says_what_it_means():
    for word, having in helping._all_keys().items():
        assert all(one.text for one in helping._meanings(word, having)), word


def test_an_example_can_be_pasted_into_a_shell():
    assert told("eval.bos").endswith("eval.bos=VALUE") and told("model.gguf_file").endswith("model.gguf_file=VALUE")


@pytest.mark.parametrize("key", ["finish.block.rate", "finish.distil.epochs", "finish.tokens"])
def test_examples_of_finishing_compose_to_what_is_not_refused(key, tiny_llama, text_file):
    *_, example = told(key).splitlines()
    words = example.removeprefix("example: alps-exp ").replace("FILE", str(text_file)).split()
    resolve(compose([*words_for(tiny_llama, text_file, *FEW_WINDOWS), *words]))


def test_every_command_is_explained():
    assert set(helping._COMMANDS) == set(completion.COMMANDS)
    for word in completion.COMMANDS:
        usage, *_, example = told(word).splitlines()
        assert usage.startswith(f"alps-exp {word} ") and example.startswith(f"example: alps-exp {word} ")
