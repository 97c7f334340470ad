"""What becomes of printed lines never fails a command, and an interrupt ends it in one line from the start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, records

MODULES = ("alps_exp", "alps_exp.tables", "alps_exp.evaluation")
SIGNS = "print('a – b ± 1 × 2 \\N{MIDDLE DOT} jürgen 模型', chr(0xDCFF))"


def shell(line: str, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """A line of bash in which $PY starts Python and "$@" are the arguments; its status is that of the first failure."""
    env = {**os.environ, "PY": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = ["bash", "-o", "pipefail", "-c", line, "bash", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, timeout=300)


def settled(code: str, redirections: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Code after `settle`, in a process whose streams are redirected."""
    code = f"from alps_exp.base.terminal import settle\nsettle()\n{code}"
    return shell(f'"$PY" -c "$1" {redirections}', code, **environment)


@pytest.mark.parametrize("redirections", [">&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", "| true", "2>&1 | true"])
def test_no_stream_can_fail(redirections):
    code = "import sys\nfor _ in range(9): print('x' * 9999, flush=True); print('y', file=sys.stderr)\nprint('z' * 9)"
    end = settled(code, redirections)
    assert end.returncode == 0 and b"Traceback" not in end.stderr
    assert (b"what was printed is lost (No space left" in end.stderr) == (redirections == ">/dev/full")


def test_a_file_opened_later_never_takes_the_place_of_a_closed_stream(tmp_path):
    file = tmp_path / "file"
    assert settled(f"f = open({str(file)!r}, 'w')\nimport os; os.system('echo lost')", "<&- >&-").returncode == 0
    assert file.read_text() == ""


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("ascii", r"a - b +- 1 x 2 . j\xfcrgen \u6a21\u578b \udcff"),
        ("cp1252", r"a – b ± 1 × 2 · jürgen \u6a21\u578b \udcff"),
        ("utf-8", r"a – b ± 1 × 2 · jürgen 模型 \udcff"),
    ],
)
def test_signs_that_an_encoding_lacks(encoding, printed):
    end = settled(SIGNS, PYTHONIOENCODING=encoding)
    assert end.stdout.decode(encoding).rstrip() == printed and not end.stderr


def test_other_peoples_streams_stay(capsys):
    from alps_exp.base.terminal import settle

    before, hook = (sys.stdout, sys.stderr), sys.excepthook
    try:
        settle()
        assert (sys.stdout, sys.stderr) == before
    finally:
        sys.excepthook = hook


@pytest.mark.heavy
@pytest.mark.parametrize(("module", "redirections"), list(zip(MODULES, (">&-", ">/dev/full", "| true"), strict=True)))
def test_messages_and_answers_need_no_standard_output(tmp_path, module, redirections):
    line = f'"$PY" -m {module} "$@" {redirections}'
    assert shell(line, "--help", cwd=tmp_path).returncode == 0
    refused = shell(line, "--no-such", cwd=tmp_path)
    assert refused.returncode == 2 and b"error: " in refused.stderr.replace(b"alps_exp: ", b"error: ")


@pytest.mark.heavy
def test_a_complete_run_is_complete_wherever_its_lines_go(tmp_path, tiny):
    line = '"$PY" -m alps_exp -m method=magnitude sparsity=0.5,0.6 "$@" >/dev/full 2>&1'
    assert shell(line, *tiny, cwd=tmp_path).returncode == 0
    assert [record["status"] for record in records(tmp_path)] == ["complete"] * 2


@pytest.mark.heavy
@pytest.mark.parametrize("module", [*MODULES, "alps_exp.demo"])
def test_an_interrupt_while_it_starts_is_one_line(tmp_path, module):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONVERBOSE": "1"}
    for begun in ("argparse", "omegaconf" if "evaluation" not in module else "yaml"):
        for _ in range(5):
            status, rest = interrupted_at(begun, [sys.executable, "-m", module, "method=alsp"], tmp_path, env)
            if status != 2:  # on a busy machine the command may have been refused before the signal came
                break
        assert status == 130 and rest.count(b"alps_exp: interrupted") == 1 and b"Traceback" not in rest


def interrupted_at(begun: str, command: list[str], folder: Path, env: dict[str, str]) -> tuple[int, bytes]:
    """Exit status of a command that is interrupted when it has imported a module, and what it says from there on."""
    options = {"cwd": folder, "env": env, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    # What a shell starts in the background, such as these tests, ignores interrupts and hands that on.
    started = subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)
    for line in started.stderr:
        if line.startswith(b"import '%s" % begun.encode()):
            break
    started.send_signal(signal.SIGINT)
    rest = started.stderr.read()
    return started.wait(60), rest


def test_an_interrupt_behind_another_error_is_one():
    from alps_exp.cli.command import guarded

    def action():
        try:
            raise KeyboardInterrupt
        finally:
            raise AttributeError("cut while tidying up")

    assert guarded(action) == 130
    assert guarded(lambda: 1 / 0) == 1


# Compiles this project's modules as `python -OO` does, which would compile all libraries anew, for half a minute.
BARE = """
import importlib.machinery, runpy, sys
plain = importlib.machinery.SourceFileLoader.get_code

def get_code(self, name):
    if name.partition(".")[0] not in ("alps_exp", "baselines"):
        return plain(self, name)
    path = self.get_filename(name)
    return compile(self.get_data(path), path, "exec", dont_inherit=True, optimize=2)

importlib.machinery.SourceFileLoader.get_code = get_code
for line in sys.argv[1:]:  # an exit status of 0 goes on to the next
    module, *sys.argv[1:] = line.split()
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.mark.heavy
def test_without_docstrings(tmp_path, tiny):
    (tmp_path / "look.py").write_text("from alps_exp.cli import command\nprint(command.__doc__)")
    run = " ".join(["alps_exp", *tiny, "method=alps", "sparsity=0.5", "hydra.run.dir=run"])
    lines = ["look", *(f"{module} --help" for module in MODULES), run]
    end = shell('"$PY" -c "$@"', BARE, *lines, cwd=tmp_path)
    assert end.returncode == 0 and end.stdout.startswith(b"None\n"), end.stderr
    assert b"alps_exp prunes" in end.stdout and end.stdout.count(b"usage: ") == len(MODULES) - 1
    assert b"run/record.json" in end.stdout
