"""Files that appear whole, digests, and locks that die with their process."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alps_exp.base import files

PACKAGE = Path(files.__file__).parents[1]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    place = tmp_path / "new" / "file.txt"
    for content in ("one", "two"):
        with files.replacing(place) as temporary:
            assert temporary.parent == place.parent
            temporary.write_text(content)
            assert not place.exists() or place.read_text() == "one"
        assert place.read_text() == content
    with pytest.raises(KeyboardInterrupt), files.replacing(place) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert place.read_text() == "two" and list(place.parent.iterdir()) == [place]


def test_a_folder_is_replaced_with_all_that_it_holds(tmp_path):
    place = tmp_path / "model"
    for name in ("a", "b"):
        with files.replacing(place) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
        assert [path.name for path in place.iterdir()] == [name]
    with pytest.raises(ValueError), files.replacing(place) as temporary:
        temporary.mkdir()
        raise ValueError
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "b"]


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644)])
def test_who_may_read_a_file_is_what_the_umask_says(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with files.replacing(tmp_path / "one.safetensors") as temporary:
            save_file({"x": torch.ones(2)}, temporary)
        with files.replacing(tmp_path / "folder") as temporary:
            temporary.mkdir()
            save_file({"x": torch.ones(2)}, temporary / "two.safetensors")
    finally:
        os.umask(before)
    written = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert [(path.name, path.stat().st_mode & 0o777) for path in written] == [
        ("two.safetensors", mode),
        ("one.safetensors", mode),
    ]


def test_what_a_killed_process_leaves_is_found_by_name(tmp_path):
    code = (
        "import os, sys, pathlib; from alps_exp.base.files import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), 9)"
    )
    for name in ("one.json", "two"):
        end = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)])
        assert end.returncode == -signal.SIGKILL
    assert len(files.leftovers(tmp_path)) == 2 and not (tmp_path / "two").exists()
    (left,) = files.leftovers(tmp_path, "one.json")
    files.remove(left)
    assert [re.sub("[0-9a-f]{8}", "X", path.name) for path in tmp_path.iterdir()] == [".two.X.tmp"]


def test_digests_are_sha256(tmp_path):
    (tmp_path / "file").write_text("ä")
    expected = hashlib.sha256("ä".encode()).hexdigest()
    assert files.sha256("ä") == files.sha256("ä".encode()) == files.file_sha256(tmp_path / "file") == expected


def test_json_without_numbers_that_json_lacks(tmp_path):
    (tmp_path / "a.json").write_text('{"x": NaN}')
    assert files.read_json(tmp_path / "a.json", constant=str) == {"x": "NaN"}


def test_locks_exclude_others_are_shared_and_pass_to_children(tmp_path):
    one, other = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    assert files.lock(one) is True and files.lock(other) is False and files.lock(other, shared=True) is False
    assert files.lock(one, shared=True) is True and files.lock(other, shared=True) is True
    assert files.lock(one) is False
    os.close(other)
    assert files.lock(one) is True
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[one])
    os.close(one)
    again = os.open(tmp_path, os.O_RDONLY)
    assert files.lock(again) is False  # the child has inherited it
    child.kill()
    child.wait()
    assert files.lock(again, wait=True) is True and not list(tmp_path.iterdir())
    os.close(again)


def test_a_file_system_without_locks_is_told_apart_from_a_held_lock(tmp_path, monkeypatch):
    def without(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    assert files.lock(descriptor) is None
    os.close(descriptor)


def test_only_one_module_locks_and_renames_files():
    """Whole replacement and locks have one place; what renames for another purpose is named here."""
    other = {"runs/record.py", "runs/resume.py", "runs/saving.py"}  # a record kept under another name, a shard's name
    words = re.compile(r"\bflock\(|\bfsync\(|\.rename\(|os\.replace\(|[a-z)]\.replace\([^,()]*(\([^()]*\))?[^,()]*\)\n")
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(words.search(line) and "source.replace(" not in line for line in path.read_text().splitlines(True))
    }
    assert found == {"base/files.py"} | other
