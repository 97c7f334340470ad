"""README and the pages of docs/: links lead somewhere, commands compose, examples run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from alps_exp.cli import overrides
from alps_exp.cli.completion import COMMANDS

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
each_page = pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.stem)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def examples(page: Path, language: str) -> list[str]:
    return [body for name, body in _FENCE.findall(read(page)) if name == language]


def commands(page: Path) -> list[list[str]]:
    """The words of every shell command: indented lines, and whole `…` in the text that begin like one."""
    text = _FENCE.sub("", read(page)).replace("\\\n", " ")
    lines = re.findall(r"^ {4}(\w.*)$", text, re.MULTILINE) + re.findall(r"`((?:python|make) [^`]+)`", text)
    return [shlex.split(line, comments=True) for line in lines]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", read(page)), re.MULTILINE)
    names = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}
    return names | set(re.findall(r"^::: (\S+)$", read(page), re.MULTILINE))


def test_readme_is_short():
    assert len(read(README).splitlines()) <= 150


@each_page
def test_every_link_leads_somewhere(page):
    for link in _LINK.findall(_FENCE.sub("", read(page))):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if "results" in target.parts and not (ROOT / "results").is_dir():
            continue  # the source archive has no results
        assert target.is_file(), link
        assert page == README or target.is_relative_to(ROOT / "docs"), f"{link}: not on the site that make docs builds"
        assert not anchor or anchor in anchors(target), link


def test_readme_and_the_index_name_every_page():
    pages = {page.name for page in DOCS} - {"index.md"}
    assert pages <= {link.removeprefix("docs/") for link in _LINK.findall(read(README))}
    assert pages <= set(_LINK.findall(read(ROOT / "docs" / "index.md")))
    site = yaml.safe_load(read(ROOT / "docs" / "mkdocs" / "mkdocs.yml"))
    assert sorted(site["nav"]) == sorted(page.name for page in DOCS)


@pytest.mark.slow
def test_every_command_of_the_program_composes(tmp_path, monkeypatch):
    # What pages call a file of the reader's own.
    for group, name in (("conf/model", "llama-7b"), ("sweeps", "demo")):
        own = tmp_path / "mine" / Path(group).name / "NAME.yaml"
        own.parent.mkdir(parents=True)
        shutil.copy(ROOT / group / f"{name}.yaml", own)
    monkeypatch.chdir(tmp_path)
    found = [words[3:] for page in (README, *DOCS) for words in commands(page) if words[1:3] == ["-m", "alps_exp"]]
    found = [words for words in found if not {*words[:1]} & {*COMMANDS}]
    assert len(found) > 40
    seen: set[str] = set()
    with overrides.initialized():
        for words in found:
            prepared = overrides.prepared(_overrides(list(words)))
            jobs = overrides.expand(prepared)[1] if "-m" in words else [prepared]
            assert jobs, words
            for job in jobs:  # each override once, instead of with all others
                if not seen.issuperset(job):
                    seen.update(job)
                    overrides.compose_prepared(job, with_hydra=True)


def _overrides(words: list[str]) -> list[str]:
    given = []
    while words:
        word = words.pop(0)
        if word == "--config-dir":
            given.append(f"hydra.searchpath=['file://{Path(words.pop(0)).resolve()}']")
        elif word in ("--cfg", "--info", "-p"):
            words.pop(0)
        elif word not in ("-m", "--help"):
            given.append(word)
    return given


@each_page
def test_every_other_command_names_what_there_is(page):
    targets = re.findall(r"^(\w+):", read(ROOT / "Makefile"), re.MULTILINE)
    for words in commands(page):
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[:2] == ["python", "-m"]:
            module = words[2].replace(".", "/")
            assert words[2] == "build" or (ROOT / module).is_dir() or (ROOT / f"{module}.py").is_file(), words
        elif words[0] == "python" and (ROOT / words[1]).parent.is_dir():  # the source archive has no benchmarks
            assert (ROOT / words[1]).is_file(), words


@pytest.mark.slow
def test_the_python_examples_run(tmp_path, tiny_llama, monkeypatch, capsys):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "llama").symlink_to(tiny_llama)
    (tmp_path / "README.md").write_text(read(README), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for page, count in ((README, 1), (ROOT / "docs" / "reference.md", 3)):
        blocks = examples(page, "python")
        assert len(blocks) == count
        exec("\n".join(blocks), {})
    assert (tmp_path / "pruned" / "model.safetensors").is_file()
    assert "mean_relative_loss" in capsys.readouterr().out


def _shown_files(page: Path) -> dict[str, str]:
    """The files that a page asks the reader to write, by path: after a sentence that ends in `PATH`: their content."""
    return dict(re.findall(r"`([\w/.]+)`:\n\n```\w+\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL))


# What to write beside each yaml, and what then passes.
_SCOPES = "tests/pruning/test_scopes.py"
_ADDED = {
    "conf/method/scaled.yaml": (
        "tests/methods/test_solvers.py",
        "assert compose(['method=scaled', 'method.power=0.25']).method.power == 0.25\n"
        "solution = alps_exp.prune_layer(weight, inputs, method='scaled', power=0.25)\n"
        "assert solution.support.sum(1).tolist() == [5] * 8\n",
    ),
    "conf/sparsity/strips.yaml": (
        "tests/patterns/test_patterns_contract.py",
        "assert compose(['sparsity=0.25x8', 'method=wanda']).sparsity.width == 8\n"
        "assert alps_exp.prune_layer(weight, inputs, method='wanda', sparsity='0.5x4').support.sum() == 64\n"
        "from alps_exp.runs.record_form import RecordForm\n"
        "values = dict(status='running', model='m', method='wanda', seed=0, summary={}, phases={}, evaluations=[])\n"
        "assert RecordForm(sparsity='0.5x4', **values).sparsity == '0.5x4'\n",
    ),
    "conf/method/pooled.yaml": (
        _SCOPES,
        "assert compose(['method=pooled']).method.name == 'pooled'\n",
    ),
    "conf/method/everywhere.yaml": (
        _SCOPES,
        "assert compose(['method=everywhere']).method.name == 'everywhere'\n",
    ),
    "conf/target/shrunk.yaml": (
        _SCOPES,
        "assert compose(['target=shrunk']).target.amount == 0.1\n",
    ),
    "conf/allocation/ends.yaml": (
        _SCOPES,
        "assert compose(['allocation=ends']).allocation.less == 0.1\n",
    ),
    "conf/eval/guesses.yaml": (
        "tests/evaluation/test_evaluations_contract.py",
        "assert compose(['eval=guesses', 'eval.first=2']).eval.first == 2\n",
    ),
}


@pytest.mark.slow
def test_every_example_of_the_page_on_extending_passes_the_tests_of_its_kind(tmp_path):
    for name in ("tests", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("alps_exp", "baselines", "conf", "sweeps"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    page = ROOT / "docs" / "extending.md"
    files = _shown_files(page)
    assert len(files) == len(examples(page, "python")) + len(examples(page, "yaml"))
    for name, content in files.items():
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert {name for name in files if name.endswith(".yaml")} == set(_ADDED)
    code = (
        "import sys, pytest, torch, alps_exp\n"
        "from alps_exp.cli.overrides import compose\n"
        f"assert alps_exp.__file__.startswith({str(tmp_path)!r})\n"
        "weight, inputs = torch.randn(8, 16), torch.randn(32, 16)\n"
        "sys.exit(pytest.main(['-rp', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    code = code.replace("sys.exit", "".join(checks for _, checks in _ADDED.values()) + "sys.exit")
    names, env = [Path(name).stem for name in _ADDED], {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = [*dict.fromkeys(tests for tests, _ in _ADDED.values()), "-k", " or ".join(names)]
    end = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert end.returncode == 0, end.stdout + end.stderr
    for name in names:
        assert len(re.findall(rf"^PASSED \S+\[.*\b{name}\b.*\]", end.stdout, re.MULTILINE)) >= 3, end.stdout
