"""Completion works in the shells that are installed, as docs/running.md says to set it up."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

from alps_exp.cli import completion
from alps_exp.cli.command import command


def test_the_projects_own_commands_and_what_follows_them(tmp_path):
    (tmp_path / "demo-alps-u0.7-s0-12345678").mkdir()
    (tmp_path / "demo-alps-u0.7-s0-12345678" / "record.json").write_text("{}")
    assert completion.commands("alps-exp ") == list(completion.COMMANDS)
    assert completion.commands("alps-exp q") == ["quick"] and completion.commands("alps-exp q ") == []
    assert completion.arguments("alps-exp show de", tmp_path) == ["demo-alps-u0.7-s0-12345678"]
    assert "method.rho" in completion.arguments("alps-exp help method.r", tmp_path)
    assert completion.arguments("alps-exp method=al", tmp_path) is None
    assert completion.arguments("alps-exp help", tmp_path) is None
    assert "status=" in completion.arguments("alps-exp list ", tmp_path)
    assert completion.arguments("alps-exp report res", tmp_path) == []
    assert completion.arguments("alps-exp stream=", tmp_path) == ["stream=auto", "stream=true", "stream=false"]
    assert completion.arguments("alps-exp minutes=", tmp_path) is None
    assert completion.commands("alps-exp method=alps -") == list(completion._OPTIONS)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            "alps-exp -m method=wanda,spars",
            {f"method=wanda,{name}" for name in ("sparsegpt", "sparsellm", "sparseswaps")},
        ),
        ("alps-exp quick target=s", {"target=stream"}),
        ("alps-exp method=wanda method.", {"method.name="}),
        ("alps-exp +pres", {"+preset="}),
        ("alps-exp word tar", set()),
    ],
)
def test_what_hydra_is_asked_and_what_becomes_of_its_answers(line, found, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", line)
    assert command(["-sc", "query=fish"]) == 0
    told = capsys.readouterr()
    assert set(told.out.split()) == found and told.err == ""


def test_the_first_word_may_be_a_command_or_a_key(monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", "alps-exp s")
    assert command(["-sc", "query=bash"]) == 0
    assert {"show", "seed=", "sparsity="} <= set(capsys.readouterr().out.split())


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """With an installed alps-exp."""
    script = tmp_path / "bin" / "alps-exp"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nfrom alps_exp.__main__ import main\nmain()\n")
    script.chmod(0o755)
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "TERM": "dumb", "PS1": "$ "}


def setup_line(shell: str) -> str:
    """What the page tells to type in a shell."""
    page = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^ {{4}}(.*install={shell}.*?)(?:\s+#.*)?$", page, re.MULTILINE)
    return line


def installed(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: apt install {shell}")


@pytest.mark.heavy
def test_bash(environment):
    installed("bash")
    line = "alps-exp method=sparseg"
    words = f"COMP_WORDS=({line}) COMP_CWORD=1 COMP_POINT={len(line)} COMP_LINE='{line}'"
    code = f'{setup_line("bash")}\n{words}\nhydra_bash_completion\necho "${{COMPREPLY[@]}}"'
    end = subprocess.run(["bash", "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert end.stdout.split() == ["method=sparsegpt"], end.stderr


@pytest.mark.heavy
def test_fish(environment):
    installed("fish")
    code = f"{setup_line('fish')}\ncomplete -C 'alps-exp method=sparseg'"
    end = subprocess.run(["fish", "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "method=sparsegpt" in end.stdout.split(), end.stderr


@pytest.mark.heavy
def test_zsh(environment, tmp_path):
    installed("zsh")
    text = typed(["zsh", "-f", "-i"], environment, tmp_path, setup_line("zsh"), "alps-exp method=sparseg\t")
    assert "method=sparsegpt" in text, text


def typed(shell: list[str], environment: dict[str, str], folder: Path, setup: str, keys: str) -> str:
    """What a shell at a terminal shows once a line and then some keys were typed."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execvpe(shell[0], shell, environment)
    shown = ""

    def until(sign: str, seconds: float) -> None:
        nonlocal shown
        end = time.monotonic() + seconds
        while sign not in shown and time.monotonic() < end:
            if select.select([terminal], [], [], 0.2)[0]:
                shown += os.read(terminal, 65536).decode(errors="replace")

    try:
        until("$ ", 30)
        os.write(terminal, f"{setup}; print settled | tr a-z A-Z\n".encode())
        until("SETTLED", 90)
        os.write(terminal, keys.encode())
        until("sparsegpt", 60)
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)
        os.close(terminal)
    return shown
