"""Every file of the configuration composes, says how it is used, and offers what its group offers."""

from __future__ import annotations

import shlex
from functools import cache
from pathlib import Path

import pytest
import tiny_models
import yaml
from omegaconf._utils import get_yaml_loader

from alps_exp.base.resources import resource_root
from alps_exp.cli import overrides, repository
from alps_exp.cli.overrides import compose
from alps_exp.evaluation import tasks
from alps_exp.model import loading
from alps_exp.runs.naming import config_hash
from alps_exp.runs.settings import resolve

CONF = resource_root() / "conf"
GROUPS = ("model", "data", "method", "sparsity", "target", "sensitivity", "allocation", "finish", "eval", "logger")
CHOICES = sorted(path for group in GROUPS for path in (CONF / group).glob("*.yaml"))
PRESETS = sorted((CONF / "preset").glob("*.yaml"))
CHOSEN = ["target=stream", "sensitivity=outputs", "allocation=sensitivity"]
SWEEPS = sorted((resource_root() / "sweeps").glob("*.yaml"))
# Values that only the user can know.
NEEDED = {"model/local": ["model.path=folder"], "data/local": ["data.path=text.txt"]}
NEEDED |= {"allocation/file": ["allocation.path=levels.json"]}


def label(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_no_file_is_overlooked():
    known = {*CHOICES, *PRESETS, CONF / "config.yaml", *(CONF / "hydra").rglob("*.yaml")}
    known |= set((CONF / "preset" / "budget").glob("*.yaml"))  # of sweeps, which compose them
    assert set(CONF.rglob("*.yaml")) == known
    assert len(CHOICES) >= 30


def test_the_quick_reader_reads_what_hydra_s_own_reads_and_no_key_is_given_twice():
    if repository._Loader is None:
        pytest.skip("PyYAML without its parser in C")
    files = [*sorted(CONF.rglob("*.yaml")), *SWEEPS]
    # Hydra's raises for a key that is given twice.
    for text in ["a: 1e-3", *(path.read_text(encoding="utf-8") for path in files)]:
        assert yaml.load(text, Loader=repository._Loader) == yaml.load(text, Loader=get_yaml_loader())


@pytest.mark.slow  # all of them together
@pytest.mark.parametrize("path", CHOICES, ids=label)
def test_every_choice_opens_with_a_command_that_works_and_sets_its_keys(path):
    group, text = path.parent.name, path.read_text(encoding="utf-8")
    first = text.splitlines()[0]
    assert first.startswith("# python -m alps_exp ")
    words = shlex.split(first.split("  ")[0].removeprefix("# python -m alps_exp "))
    cfg, chosen = compose(words), f"{group}={path.stem}"
    if chosen not in words:
        cfg = compose([chosen, *NEEDED.get(label(path), [])])
    own = yaml.safe_load(text)
    common = yaml.safe_load((CONF / "eval" / "none.yaml").read_text(encoding="utf-8")) if group == "eval" else {}
    assert set(cfg[group]) == {*own, *common} - {"defaults"}
    assert "name" in cfg[group] or group == "sparsity"


@pytest.mark.slow
@pytest.mark.parametrize("path", PRESETS, ids=label)
def test_every_preset_opens_with_a_command_that_works_and_stands_for_its_choices(path):
    text = path.read_text(encoding="utf-8")
    package, first = text.splitlines()[:2]
    assert (package, first.split("+preset=")[0]) == ("# @package _global_", "# python -m alps_exp ")
    said = {
        "paper": [],
        "stream": CHOSEN[:1],
        "residual": CHOSEN,
        "residual-finished": [*CHOSEN, "finish=[block,distil]", "data.holdout=8"],
    }[path.stem]
    one, other = (compose([*words, "method=alps"]) for words in ([f"+preset={path.stem}"], said))
    assert one == other
    assert config_hash(one) == config_hash(other)
    resolve(one)


def test_evaluations_have_the_same_keys():
    """Models and data sets: tests of theirs."""
    nodes = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (CONF / "eval").glob("*.yaml")}
    # An evaluation of a class of its own has keys of its own.
    keys = {name: set(node) - {"defaults"} for name, node in nodes.items() if "_target_" not in node}
    assert len(set(map(frozenset, keys.values()))) == 1, keys


def test_the_demo_model_brings_its_data_unless_told_otherwise():
    brought = {"": "demo", "model=demo": "demo", "model=opt-125m": "c4", "model=opt-13b": "c4"}
    chosen = {"data=wikitext2": "wikitext2", "data=c4": "c4", "model=demo data=local data.path=text.txt": "local"}
    for words, wanted in {**brought, **chosen}.items():
        cfg = compose(words.split())
        assert cfg.data.name == wanted and "defaults" not in cfg.model, words


def test_the_default_is_alps_at_07():
    cfg = compose([])
    assert (cfg.method.name, cfg.sparsity.level, cfg.model.name) == ("alps", 0.7, "demo")
    assert (cfg.seed, cfg.device, cfg.dtype, cfg.propagate) == (0, "auto", "auto", "pruned")
    assert cfg.nsamples == cfg.model.nsamples
    assert cfg.eval.seqlen == cfg.seqlen == cfg.model.seqlen


def test_large_models_calibrate_on_128_windows_of_2048():
    cfg = compose(["model=opt-13b"])
    assert (cfg.nsamples, cfg.seqlen) == (128, 2048)


@cache
def tiny_model(name):
    """A small model in place of the hub's, of the same family."""
    config = tiny_models.CONFIGS["opt" if name.startswith("opt") else "llama"]()
    if name == "demo":  # widths that every pattern divides, as the demo model's do
        config.hidden_size, config.intermediate_size, config.head_dim = 192, 384, 96
    source = loading.ModelSource(name, name, None, False)
    return loading.ModelSettings(source, config, loading.skeleton(config))


@cache
def tokenizer():
    return tiny_models.tokenizer("llama")


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=label)
def test_every_sweep_expands_into_runs_that_are_valid(path, monkeypatch):
    monkeypatch.setattr(loading, "resolve", lambda node: tiny_model(node["name"]))
    monkeypatch.setattr(loading, "load_tokenizer", lambda source: tokenizer())
    monkeypatch.setattr(loading, "check_weights", lambda model: None)
    monkeypatch.setattr(loading, "context_length", lambda config: 2048)
    monkeypatch.setattr(tasks, "prepare", lambda *_: ())
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n#")
    assert f"python -m alps_exp -m +sweeps={path.stem}" in text
    with overrides.initialized():
        jobs = overrides.expand(overrides.prepared([f"+sweeps={path.stem}"]))[1]
        assert len(jobs) > 1
        unseen = set().union(*jobs)
        while unseen:  # each value of the grid, with as few runs as hold them all
            job = max(jobs, key=lambda job: len(unseen.intersection(job)))
            unseen.difference_update(job)
            cfg = overrides.compose_prepared(job)
            assert bool(resolve(cfg).patterns) == (cfg.method.name != "dense")
