"""The wheel, the source archive and the editable install hold what they should, and the wheel works elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT
from tiny import words_for

pytestmark = pytest.mark.heavy  # starts processes

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    hatchling = pytest.importorskip("hatchling.build")
    folder = tmp_path_factory.mktemp("dist")
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        hatchling.build_wheel(str(folder))
        hatchling.build_sdist(str(folder))
        (folder / "editable").mkdir()
        hatchling.build_editable(str(folder / "editable"))
    finally:
        os.chdir(before)
    return folder


def tracked(*folders: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_is_one_package(archives):
    (wheel,) = archives.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"alps_exp", "alps_exp-0.1.0.dist-info"}
    inside = {f"alps_exp/{name}" for name in tracked("baselines", "conf", "sweeps")} | tracked("alps_exp")
    assert {name for name in names if name.startswith("alps_exp/")} == inside
    assert "alps_exp-0.1.0.dist-info/licenses/LICENSE" in names


def test_the_source_archive_is_enough_to_build_and_test(archives):
    (archive,) = archives.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    assert tracked("alps_exp", "baselines", "conf", "sweeps", "tests") <= names
    assert {"pyproject.toml", "LICENSE", "README.md", "Makefile", "constraints.txt"} <= names
    assert not {name for name in names if name.startswith(("results/", ".venv"))}


def test_the_editable_install_copies_nothing(archives):
    (wheel,) = (archives / "editable").glob("*.whl")
    content = zipfile.ZipFile(wheel)
    (path,) = (name for name in content.namelist() if ".dist-info/" not in name)
    assert path.endswith(".pth")
    assert content.read(path).decode().strip() == str(ROOT)


def test_the_wheel_works_where_no_checkout_is(archives, tmp_path):
    (wheel,) = archives.glob("*.whl")
    site, cwd = tmp_path / "site", tmp_path / "cwd"
    zipfile.ZipFile(wheel).extractall(site)
    cwd.mkdir()
    # Not the checkout, through whatever editable install this interpreter has.
    env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def call(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)

    end = call("-c", "import alps_exp, alps_exp.baselines, alps_exp.conf; print(alps_exp.baselines.__file__)")
    assert end.stdout.strip() == str(site / "alps_exp" / "baselines" / "__init__.py"), end.stderr
    end = call("-m", "alps_exp", "--cfg", "job", "sparsity=2:4", "method=wanda")
    assert end.returncode == 0, end.stderr
    assert "kept: 2" in end.stdout
    end = call("-m", "alps_exp", "-m", "+sweeps=demo", "method=wanda,alsp")
    assert (end.returncode, end.stderr.count("\n")) == (2, 1), end.stderr
    code = (
        "import torch, alps_exp\n"
        "solution = alps_exp.prune_layer(torch.eye(8), method='wanda', sparsity='2:4', inputs=torch.ones(4, 8))\n"
        "print(int(solution.weight.count_nonzero()))"
    )
    assert call("-c", code).stdout.strip() == "8"


def test_quick_runs_from_the_wheel(archives, tmp_path, tiny_llama, text_file):
    (wheel,) = archives.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    small = ["nsamples=2", "seqlen=32", "eval.windows=2", "eval.sample_tokens=4", "eval.prompt=The"]
    words = [*words_for(tiny_llama, text_file), *small]
    command = [sys.executable, "-m", "alps_exp", "quick", *words]
    end = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert end.returncode == 0 and "\nNext\n" in end.stdout, end.stderr
    assert len(list(tmp_path.glob("results/runs/*/record.json"))) == 2


def test_the_constraints_cover_every_dependency_and_name_no_host():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r'[a-z0-9.-]+==[\w.]+(; python_version [<>]=? "3\.12")?', line) for line in lines)
    pinned = {line.split("==")[0] for line in lines}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = (
        PROJECT["project"]["dependencies"] + extras["joblib"] + extras["submitit"] + extras["ray"] + extras["report"]
    )
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in wanted}
    assert names <= pinned


def test_the_script_and_the_module_are_the_same_program():
    assert PROJECT["project"]["scripts"] == {"alps-exp": "alps_exp.__main__:main"}
    assert "from .cli.command import main" in (ROOT / "alps_exp" / "__main__.py").read_text(encoding="utf-8")
