"""No pickle is run, no model code unless asked for, no name leads out of a folder, no key is written anywhere."""

from __future__ import annotations

import ast
import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT
from tiny import words_for

from alps_exp.base import redaction
from alps_exp.base.errors import UserError
from alps_exp.base.redaction import RedactingFormatter, redacted
from alps_exp.base.resources import resource_root
from alps_exp.cli import command
from alps_exp.cli.overrides import compose
from alps_exp.model import loading
from alps_exp.runs import loggers, naming, run
from alps_exp.runs.loggers import log_record
from alps_exp.runs.settings import resolve

SOURCES = [path for folder in ("alps_exp", "baselines", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
KEY = "0123456789abcdef0123456789abcdef01234567"


class _Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.fixture
def copy(tiny_llama, tmp_path) -> Path:
    """A copy of the tiny Llama that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def local(path: Path, **fields) -> dict:
    return {"name": "local", "path": str(path), **fields}


@pytest.mark.slow
def test_no_source_reads_pickles():
    for path, node in ((file, node) for file in SOURCES for node in ast.walk(ast.parse(file.read_text("utf-8")))):
        place = path.relative_to(ROOT), getattr(node, "lineno", 0)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if ast.unparse(node) == "from pickle import UnpicklingError":  # which torch.load raises of a damaged file
                continue
            if path.name == "repository.py" and ast.unparse(node) == "import pickle":  # of its own bytes, to copy
                continue
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            roots = {name.partition(".")[0] for name in names}
            assert not roots & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, place
        if isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in ("torch.load", "load_state_dict"):
                assert options.get("weights_only") == "True", place
            assert options.get("allow_pickle") != "True" and options.get("trust_remote_code") != "True", place
            assert called not in ("eval", "exec", "torch.hub.load", "pd.read_pickle", "pickle.load"), place


@pytest.mark.parametrize("protocol", ["torch", "plain"])
def test_a_bin_checkpoint_with_code_in_it_runs_nothing(copy, tmp_path, protocol):
    marker = tmp_path / "marker"
    (copy / "model.safetensors").unlink()
    state = {"model.embed_tokens.weight": _Bomb(marker)}
    file = copy / "pytorch_model.bin"
    if protocol == "torch":
        torch.save(state, file)
    else:
        file.write_bytes(pickle.dumps(state))
    with pytest.raises(UserError, match=r"pytorch_model\.bin is truncated, damaged, or holds more") as error:
        loading.load_model(loading.resolve(local(copy)))
    assert "\n" not in str(error.value) and not marker.exists()
    # The bomb is one: whoever unpickles it, or trusts the file, sets it off.
    if protocol == "plain":
        pickle.loads(file.read_bytes())
        assert marker.exists()


def with_code(folder: Path, marker: Path) -> None:
    """Let configuration, model and tokenizer name code in the folder."""
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    for name, keys in (("config", ("AutoConfig", "AutoModelForCausalLM")), ("tokenizer_config", ("AutoTokenizer",))):
        content = json.loads((folder / f"{name}.json").read_text())
        own = {key: ["own.Own", None] if key == "AutoTokenizer" else "own.Own" for key in keys}
        (folder / f"{name}.json").write_text(json.dumps({**content, "auto_map": own}))


def test_model_code_is_not_run_unless_asked_for(copy, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asked whether to trust the code"))
    marker = tmp_path / "marker"
    with_code(copy, marker)
    loading.load_model(loading.resolve(local(copy)))
    loading.load_tokenizer(loading.locate(local(copy)))
    assert not marker.exists()
    with pytest.raises(UserError):
        loading.load_model(loading.resolve(local(copy, trust_remote_code=True)))
    assert marker.exists(), "asked for by name, it is run"


@pytest.mark.parametrize("value", ["no", "false", "true", None, 2])
def test_trust_is_true_or_false(copy, value):
    with pytest.raises(UserError, match=r"model\.trust_remote_code="):
        loading.resolve(local(copy, trust_remote_code=value))


def test_no_configuration_trusts_code():
    for path in (resource_root() / "conf" / "model").glob("*.yaml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["trust_remote_code"] is False, path


@pytest.mark.parametrize("name", ["../../escape", "/etc/passwd", "..", ".", "a/b\\c", "-rf", "x\ny", "名", "a" * 500])
def test_names_of_runs_stay_in_their_folder(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = compose(["model=opt-125m", "data=wikitext2"])
    for owner in ("model", "method"):
        spoiled = cfg.copy()
        spoiled[owner].name = name
        word = naming.run_name(spoiled)
        assert Path(word).name == word and not word.startswith((".", "-")) and len(word) < 200 and word.isascii()
        assert Path("results/runs", word).resolve().parent == tmp_path / "results" / "runs"


@pytest.mark.parametrize("name", ["../../etc/hosts", "/etc/hosts", "../c4"])
def test_names_of_data_sets_lead_to_no_other_file(name):
    with pytest.raises(UserError, match="unknown data set"):
        resolve(compose([f"eval.datasets=['{name}']"]))


def test_a_gguf_file_is_one_in_its_folder(copy, tmp_path):
    (tmp_path / "other.gguf").touch()
    for name in ("../other.gguf", str(tmp_path / "other.gguf"), "a/b.gguf"):
        with pytest.raises(UserError, match=r"model\.gguf_file=.* is not allowed"):
            loading.resolve(local(copy, gguf_file=name))


@pytest.fixture
def words(tiny_llama, text_file) -> list[str]:
    small = ["nsamples=2", "seqlen=32", "eval=none", "device=cpu", "method=magnitude"]
    return words_for(tiny_llama, text_file, *small)


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        command.main(list(words))
    return end.value.code


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.fixture
def logger_with_key(tmp_path, monkeypatch) -> list[str]:
    """Words that choose a logger whose yaml carries a key."""
    content = yaml.safe_load((resource_root() / "conf" / "logger" / "wandb.yaml").read_text(encoding="utf-8"))
    (tmp_path / "mine" / "logger").mkdir(parents=True)
    (tmp_path / "mine" / "logger" / "keyed.yaml").write_text(yaml.safe_dump({**content, "api_key": KEY}))
    return ["--config-dir", str(tmp_path / "mine"), "logger=keyed", "logger.mode=disabled"]


def test_a_configuration_with_a_key_is_refused_before_anything_is_written(
    words, logger_with_key, tmp_path, monkeypatch, capfd
):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert call(*words, *logger_with_key) == command.USER_ERROR
    error = capfd.readouterr().err
    assert "logger.api_key holds a key" in error and "WANDB_API_KEY" in error and KEY not in error
    assert not list(here.iterdir())
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert call(*words, "logger=wandb", f"logger.group=x{KEY}") == command.USER_ERROR
    printed = capfd.readouterr()
    assert "logger.group holds a key" in printed.err and KEY not in printed.err + printed.out
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "word",
    [
        f"+hydra.job.env_set.WANDB_API_KEY={KEY}",
        f"++hydra.job.env_set.AWS_SECRET_ACCESS_KEY={KEY}",
        "hydra.job.env_copy=[HF_TOKEN]",
        "hydra.job.env_copy=[MY_PROXY]",
        "+hydra.job.env_set.OTHER=${oc.env:HF_TOKEN}",
        f"hydra.run.dir=results/hf_{KEY}",
        "hydra.run.dir=runs/<KEY>",
        "hydra.job.name=<KEY>",
        "hydra.sweep.dir=<KEY>",
        "hydra.sweep.subdir=x<KEY>",
        "hydra.run.dir=runs/${oc.env:HF_TOKEN}",
        "logger.group=${oc.env:HF_TOKEN}",
        "layers.sparsity={<KEY>:0.5}",
        "~data=<KEY>",
        "model.path=https://user:password@host/model",
        f"eval.prompt=https://{KEY}@host/",
        'hydra/launcher=slurm hydra.launcher.setup=["export WANDB_API_KEY=abcdefgh"]',
        "hydra/launcher=ray +hydra.launcher.ray.init.runtime_env.env_vars.HF_TOKEN=abcdefgh",
    ],
    ids=str,
)
@pytest.mark.parametrize("several", [[], ["-m", "seed=0,1"]], ids=["run", "sweep"])
def test_a_key_anywhere_is_refused_before_anything_is_written(word, several, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", KEY)
    monkeypatch.setenv("MY_PROXY", "http://me:mine@proxy:80")
    given = word.replace("<KEY>", KEY).split(" ", 1 if "launcher" in word else 0)
    assert call(*several, *words, *given) == command.USER_ERROR
    printed = capfd.readouterr()
    assert "holds a key" in printed.err and KEY not in printed.err + printed.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("several", [[], ["-m"]], ids=["run", "sweep"])
def test_a_key_in_a_file_of_the_users_is_refused(several, words, tmp_path, monkeypatch, capfd):
    (tmp_path / "here").mkdir()
    (tmp_path / "mine" / "sweeps").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    content = {"hydra": {"job": {"env_set": {"WANDB_API_KEY": KEY}}, "sweeper": {"params": {"seed": "0,1"}}}}
    (tmp_path / "mine" / "sweeps" / "own.yaml").write_text("# @package _global_\n" + yaml.safe_dump(content))
    assert call(*several, "--config-dir", str(tmp_path / "mine"), "+sweeps=own", *words) == command.USER_ERROR
    printed = capfd.readouterr()
    assert "env_set.WANDB_API_KEY holds a key" in printed.err and KEY not in printed.err + printed.out
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize(
    "word",
    [
        "+hydra.job.env_set.OMP_NUM_THREADS=1",
        "model.revision=" + KEY,
        "eval.prompt=${oc.env:HOME}",
        "eval.prompt=my token is my castle",
        'hydra/launcher=slurm hydra.launcher.setup=["export HF_TOKEN=$TOKEN","module load cuda"]',
    ],
    ids=str,
)
def test_what_is_no_key_is_let_pass(word):
    compose(["model=opt-125m", *word.split(" ", 1 if "launcher" in word else 0)])


def test_a_key_in_python_is_refused_before_the_record(words, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", KEY)
    with pytest.raises(UserError, match=r"eval\.prompt holds a key"):
        run.run(compose([*words, f"eval.prompt=say {KEY}"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("full", ["0", "1"])
def test_a_key_in_an_error_reaches_neither_record_nor_log_nor_terminal(words, tmp_path, monkeypatch, capfd, full):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HYDRA_FULL_ERROR", full)

    def explode(*arguments):
        logging.getLogger("some.library").warning("using key %s", KEY)
        raise RuntimeError(f"login with {KEY} failed")

    monkeypatch.setattr(run, "prune_blocks", explode)
    assert call(*words) == command.FAILURE
    (folder,) = (tmp_path / "results" / "runs").iterdir()
    assert "login with <WANDB_API_KEY> failed" in (folder / "record.json").read_text()
    log = (folder / "alps_exp.log").read_text()
    assert "using key <WANDB_API_KEY>" in log and "RuntimeError: login with <WANDB_API_KEY> failed" in log
    printed = capfd.readouterr()
    assert "login with <WANDB_API_KEY> failed" in printed.err and KEY not in printed.err + printed.out
    assert not files_with(KEY, tmp_path)


@pytest.mark.slow
def test_weights_and_biases_gets_the_key_from_the_environment_and_writes_it_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    record = {
        "config": {"seed": 3},
        "config_hash": "4567",
        **{"status": "complete", "model": "tiny", "method": "alps", "sparsity": "2:4", "seed": 3},
        **{"layers": [], "summary": {}, "phases": {}, "evaluations": [], "environment": {}},
    }
    assert (
        log_record(record, loggers.resolve(compose(["logger=wandb", "logger.mode=offline"]).logger), tmp_path) is None
    )
    assert list(tmp_path.rglob("*.wandb")) and not files_with(KEY, tmp_path)


def test_redaction_leaves_ordinary_words_alone(monkeypatch):
    for name in redaction.VARIABLES:
        monkeypatch.setenv(name, "short")
    assert redacted("a short text") == "a short text"
    monkeypatch.setenv("HF_TOKEN", "hf_" + KEY)
    assert redacted(f"at https://me:mine@host/x?hf_a{KEY}") == "at https://<key>@host/x?<key>"
    line = logging.LogRecord("x", logging.INFO, "f", 1, "token hf_%s", (KEY,), None)
    assert RedactingFormatter("%(message)s").format(line) == "token <HF_TOKEN>"
    redaction.refuse_keys({"eval": {"sample_tokens": 3, "prompt": "a token"}, "token": None, "list": ["x"]})
    for cfg in (
        {"a": {"token": "x"}},
        {"API_KEY": "x"},
        {"apikey": "x"},
        {"a": [{"hf_token": "x"}]},
        {"password": "x"},
    ):
        with pytest.raises(UserError, match="holds a key"):
            redaction.refuse_keys(cfg)


def test_log_files_go_through_the_redaction():
    for path in (resource_root() / "conf" / "hydra" / "job_logging").glob("*.yaml"):
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
        formatters = {handler["formatter"] for handler in node["handlers"].values()}
        assert all(
            node["formatters"][name]["class"] == "alps_exp.base.redaction.RedactingFormatter" for name in formatters
        )
        assert os.path.basename(node["handlers"]["file"]["filename"]) == "alps_exp.log"
