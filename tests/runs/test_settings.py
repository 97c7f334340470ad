"""What a run is asked to do is resolved once, into values that nobody changes and nobody reads a configuration for."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

import alps_exp
from alps_exp.cli import command
from alps_exp.cli.overrides import compose
from alps_exp.data.settings import DataSettings
from alps_exp.model import loading
from alps_exp.runs.naming import Configuration
from alps_exp.runs.settings import resolve

PACKAGE = Path(alps_exp.__file__).parent
# Where words become settings; and the one function that they pass on the way.
READERS = (
    "cli/",
    "runs/naming.py",
    "runs/settings.py",
    "runs/choices.py",
    "runs/early.py",
    "runs/values.py",
    "base/redaction.py",
)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """What was read of models, call by call."""
    calls: list[str] = []
    loading._kept.cache_clear()
    for name in ("_config", "skeleton"):
        own = getattr(loading, name)
        monkeypatch.setattr(
            loading, name, lambda *given, name=name, own=own, **more: calls.append(name) or own(*given, **more)
        )
    return calls


def test_settings_are_frozen(tiny):
    settings = resolve(compose(tiny))
    parts = (settings, settings.configuration, settings.model, settings.calibration, settings.evaluation)
    for part in (*parts, settings.calibration.data, settings.evaluation.tasks, settings.solver, settings.selection):
        assert dataclasses.is_dataclass(part)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, None)


@pytest.mark.slow
@pytest.mark.parametrize("more", [["save=true"], ["plan=true"], ["method=dense", "eval.sample_tokens=4"]])
def test_a_run_reads_config_json_once_and_makes_one_skeleton(tiny, text_file, read, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    words = [*tiny, "method=magnitude", "eval.datasets=[local]", "eval.windows=2", "eval.prompt=The", *more]
    assert command.guarded(lambda: command.command(words)) == 0
    # What was saved is another checkpoint, whose config.json is tried by itself.
    assert read == (2 if "save=true" in more else 1) * ["_config", "skeleton"]


@pytest.mark.slow
def test_a_streamed_run_makes_one_skeleton_beside_its_network(tiny, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.guarded(lambda: command.command([*tiny, "method=magnitude", "stream=true"])) == 0
    assert read == ["_config", "skeleton", "skeleton"]


@pytest.mark.slow
def test_the_runs_of_a_sweep_share_what_is_known_of_their_model(tiny, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["-m", *tiny, "method=magnitude,wanda", "sparsity=0.5,0.7"]
    assert command.guarded(lambda: command.command(words)) == 0
    assert read == ["_config", "skeleton"]


def test_a_model_that_changes_is_read_again(tiny_llama, tmp_path, read):
    node = {"name": "local", "path": str(tmp_path)}
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    assert loading.resolve(node) is loading.resolve(node) and len(read) == 2
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("256", "128"))
    assert loading.resolve(node).context == 128 and len(read) == 4


def test_the_configuration_of_a_configuration_is_itself(tiny):
    first = Configuration.of(compose([*tiny, "save=dense", "method.rho=1", "layers.include=['*v_proj','*q_proj']"]))
    again = Configuration.of(first.content)
    assert (again.content, again.digest, again.name) == (first.content, first.digest, first.name)
    assert first.content["save"] is True and first.content["layers"]["include"] == ["*q_proj", "*v_proj"]


def test_a_home_that_is_not_there_is_named(tiny):
    with pytest.raises(alps_exp.UserError, match=r"data\.path=~nobody-here/a\.txt cannot be read"):
        resolve(compose([*tiny, "data.path=~nobody-here/a.txt"]))


def test_data_settings_ignore_what_is_not_theirs():
    assert DataSettings.parse({"name": "a", "evaluate_on": ["a"]}) == DataSettings("a")


@pytest.mark.slow
def test_no_configuration_goes_below_the_command_line():
    """No module but those that resolve it imports OmegaConf or Hydra, or has a parameter called cfg."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith(READERS):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            if any(module.split(".")[0] in ("omegaconf", "hydra") for module in modules):
                found.append(f"{name}:{node.lineno} {modules}")
            if isinstance(node, ast.arg) and node.arg == "cfg":
                found.append(f"{name}:{node.lineno} cfg")
    assert not found
