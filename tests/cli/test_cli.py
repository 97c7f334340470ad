"""The command line, as a process where the process matters and in this one where it does not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers import ROOT, process, records

from alps_exp.base.errors import UserError
from alps_exp.cli import command
from alps_exp.runs import run
from alps_exp.runs.settings import Settings


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return tmp_path


def call(*words: str) -> int:
    """The exit status of the command line, in this process."""
    with pytest.raises(SystemExit) as end:
        command.main(list(words))
    return end.value.code


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("alps_exp: ")
    assert error.count("\n") == 1, error
    return error


# What the user gives: (words, what the line must contain).
MISTAKES = [
    (["method=alsp"], ["unknown method 'alsp'", "did you mean alps"]),
    (["method=3"], ["unknown method 3", "magnitude"]),
    (["model=opt-13"], ["unknown model 'opt-13'", "opt-13b"]),
    (["data=wikitxt2"], ["unknown data", "wikitext2"]),
    (["eval=perplexty"], ["unknown eval", "perplexity"]),
    (["logger=wandbb"], ["unknown logger", "wandb"]),
    (["sparsity=foo"], ["sparsity=foo is not allowed", "2:4"]),
    (["+sweeps=dmo"], ["unknown sweep 'dmo'", "demo"]),
    (["+sweeps=demo"], ["add -m"]),
    (["sweeps=demo"], ["give +sweeps=NAME"]),
    (["preset=residual"], ["give +preset=NAME"]),
    (["metod=alps"], ["unknown key 'metod'", "method"]),
    (["method.rhoo=0.3"], ["method alps has no hyperparameter 'rhoo'", "did you mean rho"]),
    (["+method.rhoo=0.3"], ["method alps has no hyperparameter 'rhoo'", "did you mean rho"]),
    (["method=wanda", "method.rho=0.3"], ["method wanda has no hyperparameter 'rho'"]),
    (["eval.widows=3"], ["unknown key 'eval.widows'", "eval.windows"]),
    (["target.strength=1"], ["unknown key 'target.strength': target=layer has none, but target=stream: give"]),
    (["+foo=3"], ["unknown key 'foo'"]),
    (["seed.x=3"], ["seed is a value"]),
    (["+seed=3"], ["seed exists already"]),
    (["hydra/laucher=joblib"], ["hydra/launcher"]),
    (["hydra.job.chdir=perhaps"], ["hydra.job.chdir=perhaps is not allowed"]),
    (["method=alps,wanda"], ["method=alps,wanda names several values", "-m"]),
    (["sparsity=0.5,0.7"], ["sparsity=0.5,0.7 names several values", "-m"]),
    (["sparsity=2:4", "sparsity.level=0.6"], ["inconsistent"]),
    (["~method"], ["method is not set"]),
    (["~seed"], ["~seed is not allowed", "seed=VALUE"]),
    (["sparsity=[0.5,0.7]"], ["sparsity=[0.5,0.7] is a list", "-m sparsity=0.5,0.7"]),
    (["method=[alps,wanda]"], ["method=[alps,wanda] is a list", "-m method=alps,wanda"]),
    (["nsamples=${model.nothing}"], ["nsamples", "model.nothing"]),
    (["method=[alps"], ["cannot read 'method=[alps'", "key=value"]),
    (["nsamples"], ["cannot read 'nsamples'"]),
    (["--nonsense"], ["unrecognized arguments: --nonsense", "keys have no dashes", "--help"]),
    (["prune"], ["cannot read 'prune': it is no KEY=VALUE", "quick, list"]),
    (["model=gpt2"], ["unknown model 'gpt2'; known: ", "model=llama-7b model.path=OWNER/NAME model.name=NAME"]),
    (["model=meta-llama/Llama-3.2-1B"], ["did you mean llama-3.2-1b;", "model.path=meta-llama/Llama-3.2-1B"]),
    (["model.path=meta-llama/Llama"], ["does not exist", "from the hub, model=llama-7b model.path=meta-llama/Llama"]),
    (["--cfg", "nothing"], ["invalid choice", "job"]),
    (["--cfg", "job", "-m"], ["give one of"]),
    (["--config-dir", "/no/such/folder"], ["no such folder"]),
    (["--config-name", "other"], ["no configuration 'other'"]),
    (["-sc", "nothing=bash"], ["install"]),
    (
        ["-m", "method=alps,alsp", "sparsity=0.5,0.6"],
        ["'alsp'", "run 3 of 4: method=alsp sparsity=0.5; none was started"],
    ),
    (["-m", "sparsity=0.5,1.5"], ["sparsity 1.5 is not allowed"]),
    (["-m", "seed=interval(0,1)"], ["interval"]),
    (["-m", "model=opt-125m", "hydra.job.name=a,b"], ["hydra.job.name"]),
    (["hydra.job.chdir=true"], ["hydra.job.chdir=true is not allowed", "leave it out"]),
    (["-m", "hydra.job.chdir=true", "seed=0,1"], ["hydra.job.chdir=true is not allowed"]),
    (["hydra.job.env_copy=[NO_SUCH_VARIABLE]"], ["NO_SUCH_VARIABLE, which is not set"]),
    (["--config-dir", "a" * 300], ["no such folder"]),
    (["sparsity=1e-12"], ["sparsity=1e-12 is not allowed", "ten digits"]),
    (["-m", "sparsity=0.5,0.99999999999"], ["0.99999999999 is not allowed"]),
]


@pytest.mark.parametrize(("words", "parts"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_costs_one_line_and_status_2(here, capsys, words, parts):
    assert call(*words) == 2
    line = one_line(capsys)
    for part in parts:
        assert part in line
    assert not list(here.iterdir()), "nothing may be written for a mistake"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["device=tpu"], "device"),
        (["seed="], "seed"),
        (["method.damping=-1"], "damping"),
        (["model.path=/no/such/folder"], "/no/such/folder"),
        (["data.path=/no/such/file.txt"], "/no/such/file.txt"),
        (["data.path=123"], "data.path=123"),
        (["data.held_out=abc"], "data.held_out"),
        (["data.join=5"], "data.join=5"),
        (["data.sampling=foo"], "data.sampling"),
        (["model.bos=foo"], "model.bos"),
        (["model.revision=main"], "model.revision"),
        (["eval.datasets=wikitext2"], "eval.datasets=[wikitext2"),
        (["eval.datasets=[wikitxt2]"], "did you mean wikitext2"),
        (["eval.datasets=[local,c4]", "eval.path=x"], "eval.path stands in for one"),
        (["eval.prompt=5"], "eval.prompt=5"),
        (["eval.sample_tokens=1000"], "context of 256"),
        (["logger=wandb", "logger.mode=onlin"], "did you mean online"),
        (["layers.include=[nothing*]"], "nothing*"),
        (["layers.include=5"], "layers.include=5"),
        (["layers.include=null"], "layers.include=None"),
        (["layers.exclude=[q_porj]"], "did you mean q_proj"),
        (["layers.exclude=[model.decoder.layers.0]"], "matches no layer"),
        (["layers.sparsity=0.5"], "layers.sparsity=0.5"),
        (["sparsity=2:5"], "not a multiple of 5"),
        (["seed=18446744073709551616"], "up to 9223372036854775807"),
        (["nsamples=99999999999999999999"], "up to 9223372036854775807"),
        (["hydra.run.dir=x/${nothing}", "hydra.sweep.dir=x/${nothing}"], "'nothing' not found"),
        (["hydra.run.dir=${oc.env:NO_SUCH}", "hydra.sweep.dir=${oc.env:NO_SUCH}"], "NO_SUCH"),
        (["data.path=" + "a" * 300], "File name too long"),
        (["model.path=" + "a" * 300], "File name too long"),
        (["model.path=~nobody-at-all/x"], "no such user"),
        (["data.path=~nobody-at-all/x"], "cannot be read"),
        (["resume=~nobody-at-all/x"], "no such user"),
        (["data.path=/"], "is not a file"),
        (["method._target_=alps_exp.no.Such"], "cannot import alps_exp.no.Such"),
        (["method._target_=os.path.join"], "os.path.join is no method"),
        (["method._target_=alps_exp.layer.solver.Solver"], "is no method"),
        (["method._target_=null"], "names no class"),
    ],
)
def test_a_wrong_value_is_refused_before_a_model_is_loaded(here, capsys, tiny, words, part, monkeypatch):
    monkeypatch.setattr(run, "run", lambda *_: pytest.fail("the run was started"))
    assert call(*tiny, *words) == 2
    assert part in one_line(capsys)
    assert not list(here.iterdir())


@pytest.mark.parametrize("word", ["device=tpu", "data.path=123", "layers.include=[nothing*]"])
def test_a_wrong_value_is_refused_before_a_sweep(here, capsys, tiny, word, monkeypatch):
    monkeypatch.setattr(run, "run", lambda *_: pytest.fail("a run was started"))
    assert call("-m", *tiny, word, "method=alps,sparsegpt") == 2
    assert "run 1 of 2" in one_line(capsys)
    assert not list(here.iterdir())


@pytest.mark.slow
def test_a_directory_that_cannot_be_made_is_one_line(here, capsys, tiny):
    (here / "file").write_text("")
    assert call(*tiny, "method=magnitude", "hydra.run.dir=file/run") == 2
    assert "hydra.run.dir=DIR" in one_line(capsys)
    assert call("-m", *tiny, "method=magnitude,wanda", "hydra.sweep.dir=file/runs") == 2
    assert "hydra.sweep.dir=DIR" in one_line(capsys)


def test_files_that_cannot_be_read_are_told_before_the_run(here, capsys, tiny, tiny_opt, monkeypatch):
    model = Path(shutil.copytree(tiny_opt, here / "model"))
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("nowhere")
    assert call(*tiny, f"model.path={model}") == 2
    assert "links to nowhere, which is not there" in one_line(capsys)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "config.json")
    assert call(*tiny) == 2
    assert "this user has no permission" in one_line(capsys)


def test_a_folder_that_is_gone_is_one_line(here, capsys, tiny):
    (here / "gone").mkdir()
    os.chdir(here / "gone")
    (here / "gone").rmdir()
    assert call(*tiny) == 2
    assert "the current folder has been removed" in one_line(capsys)


def test_a_folder_whose_name_hydra_cannot_take_is_refused(here, capsys, tiny, monkeypatch):
    (here / "a${b}").mkdir()
    monkeypatch.chdir(here / "a${b}")
    assert call(*tiny) == 2
    assert "start in another one" in one_line(capsys)


@pytest.mark.slow
def test_a_name_with_an_escaped_reference_runs(here, tiny, tiny_opt):
    shutil.copytree(tiny_opt, here / "x${y}")
    assert call(*tiny, "method=magnitude", r"model.path=x\${y}", "hydra.run.dir=run") == 0
    assert json.loads((here / "run" / "record.json").read_text())["config"]["model"]["path"].endswith("x${y}")


@pytest.fixture
def mine(tmp_path) -> Path:
    """A folder of configuration files of the user's, with signs in its name."""
    folder = tmp_path / "it's 50% mine"
    for name, text in {
        "experiment/foo": "# @package _global_\ndefaults:\n  - override /method: wanda\nnsamples: 1\n",
        "experiment/level": "# @package _global_\nsparsity:\n  level: 0.6\n",
        "experiment/bare": "nsamples: 1\n",
        "experiment/typo": "# @package _global_\nnsample: 1\n",
        "experiment/deep": "# @package _global_\neval:\n  widows: 1\n",
        "experiment/texts": "# @package _global_\ndefaults:\n  - override /data: wikitext2\n",
        "method/untargeted": "name: untargeted\n",
        "root": "defaults:\n  - config\n  - _self_\nnsamples: 1\n",
        "short": "nsamples: 1\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.mark.slow
def test_groups_and_roots_of_the_users_own(tmp_path, capsys, monkeypatch, tiny, mine):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tiny.remove("nsamples=2")
    assert call("--config-dir", str(mine), "+experiment=foo", *tiny, "hydra.run.dir=one") == 0
    assert call("--config-dir", str(mine), "-m", "+experiment=foo", *tiny, "seed=0,1") == 0
    assert call("--config-dir", str(mine), "--config-name", "root", *tiny, "method=wanda", "hydra.run.dir=two") == 0
    found = [json.loads(Path(name, "record.json").read_text()) for name in ("one", "two")] + records(Path())
    assert {(record["config"]["nsamples"], record["method"]) for record in found} == {(1, "wanda")}
    assert len(found) == 4 and Path("two", "alps_exp.log").is_file()
    capsys.readouterr()
    assert call("--config-dir", str(mine), "+experiment=texts", "data.path=x", "--cfg", "job", "-p", "data") == 0
    assert "name: wikitext2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["+experiment=bare"], "begin it with # @package _global_"),
        (["+experiment=typo"], "unknown key 'nsample' in a configuration file; did you mean nsamples"),
        (["+experiment=deep"], "unknown key 'eval.widows' in a configuration file; did you mean windows"),
        (["+experiment=level", "sparsity=0.5"], "sparsity='0.5' and a configuration file, which makes it 0.6, are inc"),
        (["+experiment=fo"], "unknown experiment 'fo'; did you mean foo?"),
        (["method=untargeted"], "method untargeted names no class"),
        (["--config-name", "short"], "has no allocation: begin its defaults with - config"),
        (["--config-name", "short", "seed=1"], "begins its defaults with - config"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_files_of_the_users_own_that_do_nothing_are_refused(here, capsys, mine, words, part):
    assert call("--config-dir", str(mine), *words) == 2
    assert part in one_line(capsys)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"a: [1, 2\n", "line 2, cannot be read as yaml"),
        (b"name: x\nname: x: y\n", "line 2, cannot be read as yaml"),
        (b"name: \xff\n", "in UTF-8"),
        (b"- a\n", "holds no keys"),
    ],
    ids=["cut", "colons", "latin", "list"],
)
def test_a_broken_file_is_named(here, capsys, mine, content, part):
    (mine / "method" / "own.yaml").write_bytes(content)
    assert call("--config-dir", str(mine), "method=own") == 2
    line = one_line(capsys)
    assert part in line and str(mine / "method" / "own.yaml") in line


def test_a_file_that_the_projects_own_would_hide_is_refused(here, capsys, mine):
    (mine / "method" / "alps.yaml").write_text("name: alps\n")
    assert call("--config-dir", str(mine)) == 2
    assert "method/alps.yaml is the name of a file of this project" in one_line(capsys)


def test_the_demo_model_takes_no_other_path(here, capsys):
    assert call("model=demo", "model.path=some/folder", "plan=true") == 2
    assert "model=local model.path=some/folder" in one_line(capsys)


@pytest.mark.slow
def test_mistakes_are_answered_without_importing_torch(tmp_path):
    refused = (["method=alsp", "sparsity=0.7"], ["model.path=./none"], ["-m", "refit=pgc", "seed=0,1"])
    refused += (
        ["method.rho=0"],
        ["-m", "seed=0,1", "+preset=residual", "target.strength=2"],
        ["finish=block", "finish.block.rate=2"],
    )
    refused += (
        ["finish=distil"],
        ["data.path=./none.txt"],
        ["data=generated", "data.top_p=2"],
        ["eval.windows=0"],
        ["device=tpu"],
    )
    refused += (["layers.exclude=5"], ["save.push=name"], ["push=a/b"], ["devices=9", "nsamples=4"])
    refused += (
        ["method=osscar", "sparsity=2:4"],
        ["method=sparsellm", "target=stream"],
        ["save=shrunk"],
        ["finish=distil", "data.holdout=8", "method=dense"],
        ["finish=distil", "data.holdout=8", "finish.tokens=99", "finish.data=none"],
        ["finish=distil", "data.holdout=8", "finish.tokens=99", "finish.path=./none.txt"],
        ["eval.datasets=[none]"],
        ["eval.path=./none.txt"],
        ["resume=./none"],
        ["target=stream", "propagate=dense"],
        ["data=generated", "stream=true"],
        ["-m", "method=alps,osscar", "sparsity=0.5,2:4", "layers.exclude=[]"],
        ["model=local", f"model.path={tmp_path}"],
        ["report", str(tmp_path)],
    )
    refused += (["device=cuda"],) if version("torch").endswith("+cpu") else ()
    answered = [(words, 2) for words in refused] + [(["--version"], 0), (["list", "--runs", str(tmp_path)], 0)]
    answered += [(["help", "method.rho"], 0)]
    code = (
        "import sys\nfrom alps_exp.__main__ import main\n"
        f"for words, status in {answered}:\n"
        "    sys.argv[1:] = words\n"
        "    try: main()\n"
        "    except SystemExit as end: assert (end.code or 0) == status, (words, end.code)\n"
        "    else: raise AssertionError(words)\n"
        "    print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    end = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    seen = [line for line in end.stdout.splitlines() if line.startswith(("True", "False"))]
    assert end.returncode == 0 and seen == ["False False"] * len(answered), end


def test_the_trace_is_shown_on_request(here, capsys, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert call("method=alsp") == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1] == "alps_exp: unknown method 'alsp'; did you mean alps?"


@pytest.mark.slow
def test_questions_about_the_configuration(here, capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == "alps_exp 0.1.0\n"
    assert call("--cfg", "job", "sparsity=4:8", "model=opt-13b") == 0
    text = capsys.readouterr().out
    assert "kept: 4" in text
    assert "hydra" not in text
    assert call("method=wanda", "--info", "defaults") == 0
    assert "method/wanda" in capsys.readouterr().out
    assert call("--cfg", "job", "--resolve", "--package", "eval") == 0
    assert "seqlen: 1024" in capsys.readouterr().out
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("line", "suggestion"),
    [
        ("alps-exp method=", "method=sparsegpt"),
        ("alps-exp method=al", "method=alps"),
        ("alps-exp sparsity=0.7 model=opt-1", "model=opt-13b"),
        ("alps-exp sparsity=2:4 sparsity.", "sparsity.kept="),
        ("alps-exp -m +sweeps=", "+sweeps=demo"),
        ("alps-exp method.r", "method.rho="),
    ],
)
def test_completion_suggests(here, capsys, monkeypatch, line, suggestion):
    monkeypatch.setenv("COMP_LINE", line)
    assert call("-sc", "query=bash") == 0
    assert suggestion in capsys.readouterr().out.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_installs(here, capsys, monkeypatch, shell):
    monkeypatch.setattr(sys, "argv", ["alps-exp"])
    assert call("-sc", f"install={shell}") == 0
    assert "alps-exp" in capsys.readouterr().out


@pytest.mark.slow
def test_a_plan_writes_nothing(here, capsys, tiny):
    assert call(*tiny, "plan=true") == 0
    assert capsys.readouterr().out.strip()
    assert call("-m", *tiny, "plan=true", "method=wanda,magnitude") == 0
    assert not list(here.iterdir())


@pytest.mark.slow
def test_a_run_as_a_process(tmp_path, tiny):
    end = process(*tiny, "sparsity=0.6", "method=magnitude", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert end.returncode == 0, end.stderr
    imported = {line.split("|")[2].strip() for line in end.stderr.splitlines() if line.startswith("import time:")}
    assert "transformers" in imported and not imported & {"sklearn", "scipy", "pandas", "matplotlib", "torchao"}
    (record,) = records(tmp_path)
    assert record["status"] == "complete"
    (directory,) = (tmp_path / "results" / "runs").iterdir()
    assert directory.name == f"tiny_opt-magnitude-u0.6-s0-{record['config_hash'][:8]}"
    assert (directory / ".hydra" / "overrides.yaml").is_file()


@pytest.mark.slow
def test_all_forms_of_sparsity_in_one_sweep(here, tmp_path, tiny):
    assert call("method=magnitude", "sparsity=0.5,'0.65',2:4,\"4:8\",1:4", *tiny, "-m") == 0
    slugs = sorted(path.name.split("-")[2] for path in (tmp_path / "results" / "runs").glob("tiny_opt-*"))
    assert slugs == ["1of4", "2of4", "4of8", "u0.5", "u0.65"]
    assert all(record["status"] == "complete" for record in records(tmp_path))


@pytest.mark.slow
def test_a_failing_run_does_not_stop_a_sweep(here, capsys, tiny, monkeypatch):
    started = []

    def fail(asked, directory, *sharing, **_):
        content = asked.configuration.content if isinstance(asked, Settings) else asked
        name, seed = content["method"]["name"], content["seed"]
        started.append(name)
        if name == "wanda":
            raise UserError("the text is too short")
        if name == "magnitude" and seed == 1:
            raise RuntimeError("out of luck\nand more")
        for finished in sharing[1:]:
            finished(directory)
        return {"summary": {}, "evaluations": []}

    monkeypatch.setattr(run, "run", fail)
    assert call("-m", *tiny, "method=wanda,alps") == 2
    first, last = capsys.readouterr().err.splitlines()[-2:]
    assert first == "alps_exp: 1 of 2 runs did not complete:"
    assert last.startswith("alps_exp: tiny_opt-wanda-u0.7-s0-") and last.endswith(": the text is too short")

    assert call("-m", *tiny, "method=wanda,magnitude,alps", "seed=0,1") == 1
    error = capsys.readouterr().err
    assert started == ["wanda", "alps", "wanda", "wanda", "magnitude", "magnitude", "alps", "alps"]
    assert "RuntimeError: out of luck; the trace is in" in error
    assert "3 of 6 runs did not complete:" in error

    assert call(*tiny, "method=magnitude", "seed=1") == 1
    line = one_line(capsys)
    log = Path(line.strip().rpartition(" ")[2])
    assert "Traceback" in log.read_text()
    assert call(*tiny, "method=wanda") == 2
    assert one_line(capsys) == "alps_exp: the text is too short\n"


def test_an_interrupt_ends_in_one_line(here, capsys, tiny, monkeypatch):
    def interrupt(cfg, directory, *_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupt)
    assert call(*tiny) == 130
    assert one_line(capsys) == "alps_exp: interrupted\n"


@pytest.mark.slow
def test_one_configuration_is_not_run_twice_in_a_sweep(here, capsys, tiny):
    assert call("-m", *tiny, "sparsity=0.5,0.50") == 2
    assert "the same configuration" in one_line(capsys)


@pytest.mark.slow
def test_a_directory_of_the_users_own(here, tiny, monkeypatch):
    directories = []

    def note(asked, directory, workspace=None, finished=None):
        directories.append(directory)
        return {"summary": {}, "evaluations": []} if finished is None or finished(directory) is None else {}

    monkeypatch.setattr(run, "run", note)
    assert call(*tiny, "hydra.run.dir=elsewhere") == 0
    assert call("-m", *tiny, "seed=1,2", "hydra.sweep.dir=grid") == 0
    assert directories[0] == here / "elsewhere"
    assert {path.parent for path in directories[1:]} == {here / "grid"}
