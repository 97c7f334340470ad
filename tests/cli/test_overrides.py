"""Sparsity as a value, dictionaries as people write them, sweeps expanded, and the names of runs."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shlex
from contextlib import nullcontext
from functools import cache

import hydra
import pytest
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from alps_exp.base.errors import UserError
from alps_exp.cli import overrides, repository
from alps_exp.cli.overrides import compose, prepare
from alps_exp.cli.repository import Repository
from alps_exp.patterns import NM, Unstructured
from alps_exp.patterns.written import pattern_of
from alps_exp.runs import naming, resume

SMALL = ["model=opt-125m", "data=wikitext2"]


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        ([], Unstructured(0.7)),
        (["sparsity=0.7"], Unstructured(0.7)),
        (["sparsity=.65"], Unstructured(0.65)),
        (["sparsity=5e-1"], Unstructured(0.5)),
        (["sparsity='0.6'"], Unstructured(0.6)),
        (['sparsity="0.6"'], Unstructured(0.6)),
        (["sparsity=2:4"], NM(2, 4)),
        (["sparsity=0.7", "sparsity=2:4"], NM(2, 4)),  # the last one counts, as everywhere
        (["sparsity='4:8'"], NM(4, 8)),
        (["sparsity=1:4"], NM(1, 4)),
        (["sparsity=nm"], NM(2, 4)),
        (["sparsity=nm", "sparsity.kept=3", "sparsity.width=8"], NM(3, 8)),
        (["sparsity=unstructured", "sparsity.level=0.6"], Unstructured(0.6)),
        (["sparsity.level=0.6"], Unstructured(0.6)),
    ],
)
def test_forms_of_sparsity(words, pattern):
    assert pattern_of(compose(SMALL + words).sparsity) == pattern


@pytest.mark.parametrize(
    "value",
    ["0", "0.0", "1", "1.0", "1.5", "-0.5", "nan", "inf", "124", "4:4", "4:2", "0:4", "2:0", "true", "null", "x"],
)
def test_sparsities_that_are_refused_say_what_is_allowed(value):
    with pytest.raises(UserError, match=r"not allowed.*(above 0 and below 1|0 < N < M)") as error:
        compose([*SMALL, f"sparsity={value}"])
    assert "\n" not in str(error.value)


def test_zero_refers_to_the_dense_run():
    with pytest.raises(UserError, match="method=dense"):
        compose([*SMALL, "sparsity=0"])


@pytest.mark.parametrize(
    "words",
    [
        ["sparsity=2:4", "sparsity.level=0.6"],
        ["sparsity=0.7", "sparsity.level=0.6"],
        ["sparsity=nm", "sparsity.level=0.6"],
        ["sparsity=unstructured", "sparsity.kept=2"],
        ["sparsity=0.5", "sparsity.width=4"],
    ],
)
def test_a_value_and_a_foreign_key_are_inconsistent(words):
    with pytest.raises(UserError, match="inconsistent"):
        compose(SMALL + words)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"kind": "unstructured"}, "needs sparsity.level"),
        ({"kind": "nm", "kept": 2}, "needs sparsity.width"),
        ({"kind": "nm", "kept": 2, "width": 4, "level": 0.5}, "inconsistent"),
        ({"kind": "nm", "kept": 2.0, "width": 4}, "whole number"),
        ({"kind": "blocky"}, "did you mean block"),
        ({"kind": "unstructured", "level": "2:4"}, "not allowed"),
    ],
)
def test_nodes_that_are_no_pattern(node, message):
    with pytest.raises(UserError, match=message):
        pattern_of(OmegaConf.create(node))


def test_a_file_of_the_package_is_parsed_once_while_it_says_the_same(tmp_path, monkeypatch):
    first = compose(SMALL)
    (tmp_path / "own_conf").mkdir()
    file = tmp_path / "own_conf" / "x.yaml"
    (tmp_path / "own_conf" / "__init__.py").touch()
    file.write_text("a: [1]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = ConfigSearchPathImpl()
    path.append("main", "pkg://own_conf")
    store = Repository(path)
    parsed = []
    monkeypatch.setattr(OmegaConf, "load", lambda stream, own=OmegaConf.load: parsed.append(stream.name) or own(stream))
    store.load_config("x").config.a.append(2)  # as Hydra does with what it gets
    assert store.load_config("x").config == copy.deepcopy(store).load_config("x").config == {"a": [1]}
    assert parsed == [str(file)]
    file.write_text("a: [3]\n")
    assert store.load_config("x").config == {"a": [3]}
    parsed.clear()
    first.layers.include.append("x")
    assert compose(SMALL).layers.include == ["*"] and not parsed


def test_lists_are_quoted_value_by_value():
    assert prepare(["sparsity=0.5,'0.6',2:4,nm"]) == ["sparsity='0.5','0.6','2:4','nm'"]


def test_a_range_ends_before_its_end():
    assert prepare(["sparsity=range(0.5,0.8,step=0.1)"]) == ["sparsity='0.5','0.6','0.7'"]


def test_what_is_not_sparsity_is_left_alone():
    words = ["method=alps", "seed=1,2", "hydra.run.dir=x", "layers.exclude=[a,b]", "~logger", "sparsity=nm"]
    assert prepare(words) == words


NAMES = ["~/x", "/home/jürgen", "日本", "x(1)", "x(1,2)", "x#y", "epoch=3-step=1000", "a b", "it's", 'say "x"', "{1}"]
NAMES += [
    "[list]",
    "[a#b]",
    "brace{1}",
    "true",
    "1.0",
    "007",
    "1e5",
    "50%",
    "a$b",
    "back\\slash",
    "end#\\",
    "a&b;c|d!e",
]


@pytest.mark.parametrize("name", NAMES, ids=[f"name{number}" for number in range(len(NAMES))])
def test_names_are_taken_as_they_are_written(name):
    keys = ("model.path", "data.path", "eval.path", "logger.group")
    cfg = compose(["logger=wandb", *(f"{key}={name}" for key in keys)])
    assert [OmegaConf.select(cfg, key) for key in keys] == [name] * 4


def test_names_are_taken_as_they_are_written_in_sweeps():
    jobs = jobs_of([*SMALL, f"model.path={','.join(NAMES)}"])
    parse = OverridesParser.create().parse_override
    found = [parse(word).value() for job in jobs for word in job if word.startswith("model.path=")]
    assert [value if isinstance(value, str) else value.text for value in found] == NAMES
    with overrides.initialized():
        assert overrides.compose_prepared(jobs[3]).model.path == NAMES[3]


def test_names_within_dictionaries_and_lists_are_taken_as_they_are_written():
    cfg = compose(
        [*SMALL, "eval.path={wikitext2:/home/jürgen/x#1.txt,ptb:~/b.txt}", "logger=wandb", "logger.tags=[größe,b]"]
    )
    assert cfg.eval.path == {"wikitext2": "/home/jürgen/x#1.txt", "ptb": "~/b.txt"}
    assert cfg.logger.tags == ["größe", "b"]


@pytest.mark.parametrize("word", ["model.path=a,b", "eval.prompt=Hello, you", "eval.prompt=Hello (you), 'friend'"])
def test_the_form_that_a_message_prints_works(word):
    with pytest.raises(UserError, match=r"names several values|cannot read") as error:
        compose([*SMALL, word])
    key, _, text = word.partition("=")
    (printed,) = re.findall(r"written ('.*')|text it is ('.*')", str(error.value))
    assert OmegaConf.select(compose([*SMALL, *shlex.split("".join(printed))]), key) == text


def test_a_reference_in_a_name_is_escaped_as_the_message_says():
    with pytest.raises(UserError, match=r"model\.path: .*'x' not found; .* is written \\\$\{"):
        compose(["model.path=inter${x}"])
    assert compose(["model.path=inter\\${x}"]).model.path == "inter${x}"


def test_the_tilde_of_a_runs_folder_is_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert prepare(["hydra.run.dir=~/x", "hydra.sweep.dir=~"]) == [
        "hydra.run.dir=/home/me/x",
        "hydra.sweep.dir=/home/me",
    ]


def test_a_text_without_a_choice_of_data_is_a_local_one():
    assert compose(["data.path=FILE"]).data == compose(["data=local", "data.path=FILE"]).data
    assert compose(["data=c4", "data.path=FILE"]).data.name == "c4"


@pytest.mark.parametrize(
    "words",
    [
        ["save=packed", "save.format=dense"],
        ["save.format=dense", "save.format=packed"],
        ["save=false", "save.format=packed"],
    ],
    ids=" ".join,
)
def test_contradictory_forms_of_saving_are_refused(words):
    with pytest.raises(UserError, match=r"inconsistent: give one of them"):
        compose([*SMALL, *words])
    assert compose([*SMALL, "save=packed", "save.format=packed"]).save == "packed"


def test_a_path_without_a_model_is_a_local_one():
    assert compose(["model.path=DIR"]).model == compose(["model=local", "model.path=DIR"]).model
    assert compose(["model.path=DIR"]).data.name == "c4"
    assert prepare(["model=opt-13b", "model.path=DIR"]) == ["model=opt-13b", "model.path=DIR"]


@pytest.mark.parametrize(
    ("word", "content"),
    [
        ('layers.sparsity={"*.down_proj":0.5,"*.k_proj":"2:4"}', {"*.down_proj": 0.5, "*.k_proj": "2:4"}),
        ("layers.sparsity={*.down_proj: 0.5, *.k_proj: 2:4}", {"*.down_proj": 0.5, "*.k_proj": "2:4"}),
        ("layers.sparsity={'model.layers.[01].*': 0.5}", {"model.layers.[01].*": 0.5}),
    ],
)
def test_sparsity_by_layer(word, content):
    assert compose([*SMALL, word]).layers.sparsity == content


def test_layers_by_pattern():
    cfg = compose([*SMALL, 'layers.exclude=["*.k_proj","*.fc1"]', "layers.include=[*.layers.0.*]"])
    assert cfg.layers == {"include": ["*.layers.0.*"], "exclude": ["*.k_proj", "*.fc1"], "sparsity": {}}


def jobs_of(words: list[str]) -> list[list[str]]:
    with overrides.initialized():
        return overrides.expand(overrides.prepared(words))[1]


def test_a_sweep_is_expanded_in_order():
    assert jobs_of(["method=alps,wanda", "sparsity=0.5,2:4", "seed=1"]) == [
        ["method=alps", "sparsity='0.5'", "seed=1"],
        ["method=alps", "sparsity='2:4'", "seed=1"],
        ["method=wanda", "sparsity='0.5'", "seed=1"],
        ["method=wanda", "sparsity='2:4'", "seed=1"],
    ]


def test_levels_named_only_in_a_sweep_file_are_registered():
    jobs = jobs_of([*SMALL, "+sweeps=demo"])
    levels = {word for job in jobs for word in job if word.startswith("sparsity=")}
    assert levels >= {"sparsity='0.5'", "sparsity='2:4'"}
    with overrides.initialized():
        assert pattern_of(overrides.compose_prepared(jobs[-1]).sparsity) == NM(2, 4)


def test_the_command_line_replaces_what_a_sweep_file_says():
    jobs = jobs_of(["+sweeps=demo", "sparsity=0.33", "method=wanda,dense"])
    assert [[word for word in job if "=" in word and not word.startswith("+")] for job in jobs] == [
        ["method=wanda", "sparsity='0.33'"],
        ["method=dense", "sparsity='0.33'"],
    ]


@pytest.mark.parametrize(
    "words",
    [["+sweeps=finished", "sparsity=0.7", "seed=0"], ["target=stream,layer"]],
    ids=["preset-of-a-file", "list"],
)
def test_one_value_for_a_choice_that_only_the_jobs_make(words):
    jobs = jobs_of([*words, "target.strength=auto", "hydra.sweep.dir=elsewhere"])
    assert jobs
    assert all("target.strength=auto" in job for job in jobs)
    with overrides.initialized():
        assert overrides.compose_prepared(jobs[0]).target.strength == "auto"


def test_one_value_for_a_choice_that_no_job_makes():
    with pytest.raises(UserError, match="target=layer has none, but target=stream"):
        jobs_of(["+sweeps=demo", "target.strength=auto"])


@pytest.mark.parametrize("written", ["0.41,2:4", "\"'0.41','2:4'\"", '[0.41, "2:4"]'])
def test_a_users_own_sweep_file(tmp_path, written):
    (tmp_path / "sweeps").mkdir()
    content = f"# @package _global_\nhydra:\n  sweeper:\n    params:\n      sparsity: {written}\n      seed: 1,2\n"
    (tmp_path / "sweeps" / "own.yaml").write_text(content)
    jobs = jobs_of([f"hydra.searchpath=[file://{tmp_path}]", "+sweeps=own"])
    assert len(jobs) == 4
    assert {word for job in jobs for word in job} >= {"sparsity='0.41'", "sparsity='2:4'", "seed=1", "seed=2"}


def test_compose_leaves_another_use_of_hydra_in_place():
    with hydra.initialize_config_module("alps_exp.conf", version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        compose(SMALL)
        assert GlobalHydra.instance().hydra is outer
        with pytest.raises(UserError):
            compose(["method=none_such"])
        assert GlobalHydra.instance().hydra is outer
    compose(SMALL)
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.slow
def test_the_hash_is_that_of_what_would_be_computed():
    default = naming.config_hash(compose(SMALL))
    for same in (
        ["sparsity=0.7"],
        ["logger=wandb"],
        ["plan=true", "minutes=3", "complete=skip"],
        ["sparsity=unstructured"],
        ["sparsity='0.70'"],
    ):
        assert naming.config_hash(compose(SMALL + same)) == default
    others = [["sparsity=0.71"], ["seed=1"], ["save=true"], ["method.rho=0.2"], ["eval=none"], ["nsamples=64"]]
    hashes = {naming.config_hash(compose(SMALL + other)) for other in others}
    assert len(hashes) == len(others)
    assert default not in hashes


def test_the_order_of_layers_own_sparsities_decides_about_the_run():
    one, other = ('"*.fc1":0.3,"*.0.*":0.6', '"*.0.*":0.6,"*.fc1":0.3')
    first, second = (naming.Configuration.of(compose([*SMALL, f"layers.sparsity={{{text}}}"])) for text in (one, other))
    assert first.digest != second.digest
    again = naming.Configuration.of(json.loads(json.dumps(first.content)))
    assert again.digest == first.digest, "as a record has it"
    told = resume._differences({"config_hash": first.digest, "config": first.content}, second)
    assert told.startswith("layers.sparsity")


@pytest.mark.slow
def test_a_dense_run_is_named_by_what_its_evaluation_depends_on():
    dense = [*SMALL, "method=dense", "data=wikitext2", "eval.datasets=[wikitext2]"]

    @cache
    def name(*words: str) -> str:
        return naming.run_name(compose(words))

    def same(*words: str) -> bool:
        return name(*dense, *words) == name(*dense)

    assert name(*dense) == f"opt-125m-dense-{naming.config_hash(compose(dense))[:8]}"
    assert same("sparsity=2:4", "seed=1", "nsamples=3", "propagate=dense", "losses=false", "batch_size=2", "devices=2")
    assert same("layers.exclude=[k_proj]", "data.holdout=4", "seqlen=64", "eval.seqlen=2048")
    for word in ("seqlen=64", "eval.windows=3", "model.bos=true", "data.column=x", "dtype=float16", "save=true"):
        assert not same(word), word
    # Texts that are not evaluated, and windows where there is no text, do not matter.
    dense = [*SMALL, "method=dense", "eval.datasets=[ptb]"]
    assert same("data=c4") and not same("seqlen=64")
    dense = [*SMALL, "method=dense", "eval=zeroshot"]
    assert same("seqlen=64") and not same("eval.limit=10")


def test_the_name_of_a_run_is_safe_and_tells_what_it_is(tmp_path):
    cfg = compose([*SMALL, "sparsity=2:4", "seed=3", "method=wanda"])
    assert naming.run_name(cfg) == f"opt-125m-wanda-2of4-s3-{naming.config_hash(cfg)[:8]}"
    local = compose(["model=local", f"model.path='{tmp_path}/my model: v2'", "data=local", "data.path=x.txt"])
    assert naming.run_name(local).startswith("my_model_v2-alps-u0.7-s0-")


@pytest.mark.slow
def test_what_is_written_in_another_way_is_the_same_run(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "t.txt").touch()
    monkeypatch.chdir(tmp_path)

    @cache
    def name(*words: str) -> str:
        path = [] if any(word.startswith("model.path=") for word in words) else [f"model.path={tmp_path}/m"]
        return naming.run_name(compose(["model=local", "data=local", f"data.path={tmp_path}/t.txt", *path, *words]))

    for place in ("m", "m/", "./m", "../" + tmp_path.name + "/m"):
        assert name(f"model.path={place}") == name(), place
    for one, other in (
        ("method.rho=1", "method.rho=1.0"),
        ("data.path=t.txt", f"data.path={tmp_path}/t.txt"),
        ("data.eval_path=t.txt", f"data.eval_path={tmp_path}/t.txt"),
        ("eval.path={local:t.txt}", f"eval.path={{local:{tmp_path}/t.txt}}"),
        ("eval.task_source=m", f"eval.task_source={tmp_path}/m"),
        ("save=true", "save=dense"),
        ("layers.exclude=[k_proj,q_proj]", "layers.exclude=[q_proj,k_proj]"),
        ("layers.sparsity={k_proj:0.5}", "layers.sparsity={k_proj:'0.50'}"),
    ):
        assert name(one) == name(other), one
    assert name("method.max_iterations=3") != name("method.max_iterations=4")
    # A model on the hub is known by its id, unless a folder of that name is here.
    assert naming.canonical(compose(["model=opt-125m"]))["model"]["path"] == "facebook/opt-125m"
    # The hash is that of the configuration as written, but for keys that begin with an underscore.
    content = OmegaConf.to_container(compose(SMALL), resolve=True)
    kept = {
        key: value for key, value in copy.deepcopy(content).items() if key not in {*naming.NOT_HASHED, *naming.NEUTRAL}
    }
    assert kept["method"].pop("_target_") and kept["method"].pop("_look_") and kept["sparsity"].pop("_target_")
    assert kept["method"].pop("trace") is False and kept["eval"].pop("run_code") is False
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    assert naming.config_hash(compose(SMALL)) == naming.config_hash(content) == digest


def test_a_default_may_refer_to_another_choice(tmp_path):
    """Hydra's map of all choices is made only for the files that need it."""
    (tmp_path / "root.yaml").write_text("defaults: [config, mine: '${method}', _self_, override method: wanda]\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "wanda.yaml").write_text("# @package _global_\nnsamples: 7\n")
    with overrides.initialized(tmp_path):
        assert overrides.compose_prepared(overrides.prepared(SMALL, "root"), "root").nsamples == 7


def said(node) -> tuple:
    """All that a configuration is made of, with types and flags."""
    meta = node._metadata
    own = meta.flags, meta.ref_type, meta.object_type, meta.optional
    if not OmegaConf.is_config(node) or isinstance(node._value(), str | None):
        return *own, node._value()
    keys = list(node) if OmegaConf.is_dict(node) else range(len(node))
    return *own, [(key, said(node._get_node(key))) for key in keys]


@pytest.mark.slow
def test_files_that_were_merged_before_give_the_same_configuration(tmp_path, monkeypatch):
    """As Hydra's own merge; a file of the user's is read again."""

    def composed() -> tuple:
        with overrides.initialized():
            words = overrides.prepared(["model=opt-125m", "+preset=stream", "sparsity=2:4"])
            return said(overrides.compose_prepared(words, with_hydra=True))

    with monkeypatch.context() as patch:
        patch.setattr(overrides, "lean", nullcontext)
        expected = composed()
    composed()
    kept = len(repository._merged)
    assert [composed(), composed()] == [expected] * 2 and len(repository._merged) == kept
    (tmp_path / "preset").mkdir()
    for seed in (3, 4):
        (tmp_path / "preset/own.yaml").write_text(f"# @package _global_\nseed: {seed}\n")
        with overrides.initialized(tmp_path):
            assert overrides.compose_prepared(overrides.prepared(["+preset=own"])).seed == seed
