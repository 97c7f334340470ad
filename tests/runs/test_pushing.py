"""save.push: refused before anything is pruned, pushed whole or not at all, with a card that says what was done."""

from __future__ import annotations

import json
from pathlib import Path

import fake_hub
import pytest
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file

from alps_exp.base.errors import UserError
from alps_exp.checkpoints import upload
from alps_exp.cli.command import command, guarded
from alps_exp.runs.card import base_of, card

TOKEN, READER, SCOPED = "hf_" + "a" * 34, "hf_" + "b" * 34, "hf_" + "c" * 34


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's folder and the requests that it was asked; its user is `me`, who is in `team` and reads `others`."""
    root = tmp_path / "hub"
    root.mkdir()
    me = {"name": "me", "orgs": [{"name": "team", "roleInOrg": "write"}, {"name": "others", "roleInOrg": "read"}]}
    scope = {"entity": {"name": "me/allowed"}, "permissions": ["repo.write"]}
    users = {
        TOKEN: me | {"auth": {"accessToken": {"role": "write"}}},
        READER: me | {"auth": {"accessToken": {"role": "read"}}},
        SCOPED: me | {"auth": {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": [scope]}}}},
    }
    (root / "USERS.json").write_text(json.dumps(users))
    with fake_hub.serving(root) as (address, asked):
        fake_hub.use(address, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield root, asked


def pushed(root: Path, repo: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (root / "models" / repo).iterdir()}


REFUSED = {
    "no-owner": ("model", TOKEN, "give OWNER/NAME"),
    "two-owners": ("me/a/b", TOKEN, "give OWNER/NAME"),
    "bad-name": ("me/a--b", TOKEN, "give OWNER/NAME"),
    "no-token": ("me/new", None, "needs a token"),
    "unknown": ("me/new", "hf_" + "z" * 34, "does not accept the token"),
    "reader": ("me/new", READER, "may read me and not write"),
    "organisation": ("others/new", TOKEN, "may read others and not write"),
    "stranger": ("stranger/new", TOKEN, "who is not in stranger: give me/new"),
    "scope": ("me/new", SCOPED, "may read me and not write"),
    "occupied": ("me/theirs", TOKEN, "holds something else (model.bin)"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("repo", "token", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_pushed_is_refused(hub, monkeypatch, repo, token, words):
    root, asked = hub
    (root / "models" / "me" / "theirs").mkdir(parents=True)
    (root / "models" / "me" / "theirs" / "model.bin").write_bytes(b"theirs")
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(root / "none"))
    with pytest.raises(UserError) as refusal:
        upload.check(repo)
    assert words in str(refusal.value) and str(token) not in str(refusal.value)
    assert not any(line.startswith(("POST", "PUT")) for line in asked)


@pytest.mark.slow
def test_what_can_be_pushed(hub, monkeypatch):
    root, _ = hub
    (root / "models" / "me" / "ours").mkdir(parents=True)
    (root / "models" / "me" / "ours" / upload.MARK).write_text("{}")
    for repo in ("me/new", "team/new", "me/ours"):
        upload.check(repo)
    monkeypatch.setenv("HF_TOKEN", SCOPED)
    upload.check("me/allowed")


@pytest.mark.slow
def test_without_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        upload.check("me/new")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached"):
        upload.check("me/new")


def start(words: list[str], folder: Path, monkeypatch, *more: str) -> int:
    monkeypatch.chdir(folder)
    return guarded(lambda: command([*words, f"hydra.run.dir={folder / 'run'}", *more]))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_a_run_pushes_what_it_has_saved(hub, tiny, tmp_path, monkeypatch, capsys, form):
    root, _ = hub
    assert start(tiny, tmp_path, monkeypatch, f"save={form}", "save.push=me/new", "method=magnitude") == 0
    assert "pushed to http" in capsys.readouterr().out
    found = pushed(root, "me/new")
    local = {file.name: file.read_bytes() for file in (tmp_path / "run" / "model").iterdir()}
    assert found.pop(".gitattributes") in (b"private=private", b"private=True")
    assert found == local
    text = found["README.md"].decode()
    head = yaml.safe_load(text.split("---")[1])
    assert head["tags"] == ["alps_exp", "pruning", "sparse", "magnitude"] and "base_model" not in head
    assert ("load_packed" in text) == (form == "packed")
    for words in ("python -m alps_exp", "method=magnitude", "model.decoder.layers.0.self\\_attn.q\\_proj"):
        assert words in text
    for name in ("README.md", upload.MARK):
        assert str(tmp_path) not in found[name].decode() and TOKEN not in found[name].decode()
    record = json.loads((tmp_path / "run" / upload.MARK).read_text())
    assert record["status"] == "complete" and record["pushed"].endswith(fake_hub.COMMIT)


@pytest.mark.slow
def test_a_commit_that_fails_leaves_nothing_and_the_same_command_goes_on(hub, tiny, tmp_path, monkeypatch, capsys):
    root, _ = hub
    (root / "models" / "me" / "ours").mkdir(parents=True)
    for name in (upload.MARK, "stale.safetensors"):
        (root / "models" / "me" / "ours" / name).write_bytes(b"{}")
    (root / "CLOSED").touch()
    words = ("save.push=me/ours", "method=magnitude")
    assert start(tiny, tmp_path, monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert "saved and not pushed to me/ours" in error and "hf upload me/ours" in error
    assert set(pushed(root, "me/ours")) == {upload.MARK, "stale.safetensors"}
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    (root / "CLOSED").unlink()
    assert start(tiny, tmp_path, monkeypatch, *words) == 0
    assert "blocks are finished already" in capsys.readouterr().err
    assert "stale.safetensors" not in pushed(root, "me/ours")
    assert load_file(root / "models" / "me" / "ours" / "model.safetensors")


@pytest.mark.slow
def test_refused_before_the_run(hub, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", READER)
    assert start(tiny, tmp_path, monkeypatch, "save.push=me/new") == 2
    assert "may read me and not write" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert start(tiny, tmp_path, monkeypatch, "save=false", "save.push=me/new") == 2
    assert "pushes what is saved" in capsys.readouterr().err
    assert start(tiny, tmp_path, monkeypatch, "-m", "seed=0,1", "save.push=me/new") == 2
    assert "names one repository for all runs of a sweep" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_says_what_goes_where_and_asks_no_hub(hub, tiny, tmp_path, monkeypatch, capsys):
    root, asked = hub
    words = ("save=packed", "save.push=me/new", "plan=true")
    assert start(tiny, tmp_path, monkeypatch, *words) == 0
    text = capsys.readouterr().out
    assert "of the saved model, its card and record to http" in text and "/me/new, private if it is new" in text
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(root / "none"))
    assert start(tiny, tmp_path, monkeypatch, *words) == 2
    assert "save.push=me/new needs a token that may write" in capsys.readouterr().err
    assert asked == [] and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_more_files_than_one_commit_takes(hub, tmp_path, monkeypatch):
    """A push that fails after its first commit leaves a repository that the next one knows as its own."""
    root, _ = hub
    folder, repository = tmp_path / "model", root / "models" / "me" / "many"
    folder.mkdir()
    for name in (upload.MARK, *(f"{number}.json" for number in range(250))):
        (folder / name).write_text(f"[{name!r}]")

    def fail(*_, **__):
        (repository / "0.json").write_text("[]")
        raise OSError("the line broke")

    with monkeypatch.context() as broken, pytest.raises(UserError, match="saved and not pushed"):
        broken.setattr("huggingface_hub.HfApi.upload_folder", fail)
        upload.push(folder, "me/many", "many")
    upload.check("me/many")
    upload.push(folder, "me/many", "many")
    found = pushed(root, "me/many")
    assert found.pop(".gitattributes") and found == {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
def test_a_card_names_base_licence_and_layers(hub, tmp_path):
    root, _ = hub
    (root / "models" / "them" / "base").mkdir(parents=True)
    (root / "models" / "them" / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    base, licence = base_of({"name": "base", "path": "them/base", "revision": None}, "")
    assert (base, licence) == ("them/base", "mit")
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\nwords\n")
    assert base_of({"name": "local", "path": str(tmp_path)}, str(tmp_path)) == (None, "apache-2.0")
    layers = [{"name": f"b.{n}", "sparsity": 0.7, "relative_loss": 0.1} for n in range(1001)]
    choices = {name: {"name": "none"} for name in ("target", "sensitivity", "allocation", "finish")}
    record = {
        "config": {**choices, "refit": "pcg"}, "model": "a|b", "method": "alps", "sparsity": "0.7", "seed": 3,
        "summary": {"sparsity": 0.7, "layers": 1001, "mean_relative_loss": 0.1}, "layers": layers, "saved": None,
        "calibration": {"windows": 8, "seqlen": 64, "dataset": "c4"}, "warnings": ["<b>beware</b>"],
        "environment": {"code": "1", "git_commit": None, "python": "3", "versions": {"torch": "2"}, "device": "CPU"},
        "evaluations": [{"dataset": "c4", "metric": "perplexity", "value": "inf", "windows": 2, "total_windows": 4,
                         "seqlen": 64, "partial": True, "better": "lower"}],
    }  # fmt: skip
    text = card(record, base, licence, "python -m alps_exp data.path=/home/me/secret/text.txt")
    assert yaml.safe_load(text.split("---")[1])["license"] == "mit"
    head = yaml.safe_load(card(record, None, "Our own, 2 pages", None).split("---")[1])  # what the hub would refuse
    assert (head["license"], head["license_name"]) == ("other", "Our own, 2 pages")
    told = (
        "pruned by alps",
        "8 windows of 64 tokens of c4, seed 3",
        "| 2 of 4",
        "| inf",
        "b.999",
        "And 1 more",
        "refit",
    )
    assert [words for words in (*told, "\\<b\\>beware", "them/base") if words not in text] == []
    assert "secret" not in text and "b.1000" not in text
