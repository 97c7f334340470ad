"""What every evaluation of a class of its own keeps to: those that conf/eval/*.yaml names, and two defined here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import yaml
from tiny import execute, weights

from alps_exp import Evaluation, Figure, UserError, require
from alps_exp.base.resources import resource_root
from alps_exp.cli.cell import _figures
from alps_exp.cli.overrides import compose
from alps_exp.cli.plan import plan
from alps_exp.evaluation import protocol
from alps_exp.evaluation.evaluation import build_evaluation
from alps_exp.evaluation.perplexity import whole_model
from alps_exp.runs.naming import run_name
from alps_exp.runs.record_form import RecordForm
from alps_exp.runs.settings import resolve
from alps_exp.tables import figures


@dataclass(frozen=True)
class Pace(Evaluation):
    """Tokens per second of forwards of some windows at a time."""

    batches: tuple[int, ...] = (1, 2)
    seconds: float = 0.0  # at least so long
    seqlen: int = 16  # eval.seqlen

    def __post_init__(self) -> None:
        for size in self.batches:
            require("eval.batches", size, int, 1, 64)

    def check(self, model) -> None:
        if max(self.batches) > 63:
            raise UserError(f"batches of {max(self.batches)} are too many for a model of {model.context} positions")

    @torch.no_grad()
    def measure(self, model, texts, tokenizer):
        found = []
        with whole_model(model) as resident:
            for size in self.batches:
                ids = torch.ones(size, self.seqlen, dtype=torch.long, device=model.device)
                start = time.perf_counter()
                model.model(input_ids=ids)
                rate = ids.numel() / (time.perf_counter() - start)
                more = {"resident": resident}
                found.append(Figure("prefill", f"batch {size}", rate, "higher", unit="tokens/s", more=more))
        return found


@dataclass(frozen=True)
class Surprise(Evaluation):
    """The perplexity again, by the network's own forward."""

    reads: ClassVar[str] = "texts"

    @torch.no_grad()
    def measure(self, model, texts, tokenizer):
        with whole_model(model):
            return [Figure.on(text, "surprise", self._of(model, text.windows), "lower", shown=False) for text in texts]

    @staticmethod
    def _of(model, windows):
        losses = [model.model(input_ids=ids[None], labels=ids[None]).loss.double() for ids in windows.to(model.device)]
        return float(torch.stack(losses).mean().exp())


# The yaml files of the two.
PACE = {
    "defaults": ["none", "_self_"],
    "name": "pace",
    "_target_": f"{__name__}.Pace",
    "batches": [1, 2],
    "seconds": 0.0,
}
SURPRISE = {"defaults": ["perplexity", "_self_"], "name": "surprise", "_target_": f"{__name__}.Surprise"}

FILES = {
    file.stem: yaml.safe_load(file.read_text("utf-8")) for file in (resource_root() / "conf" / "eval").glob("*.yaml")
}
each = pytest.mark.parametrize("name", [*sorted(k for k, v in FILES.items() if "_target_" in v), "pace", "surprise"])
SMALL = ["eval.seqlen=16", "eval.windows=3", "eval.sample_tokens=0"]
THRIFT = {"speed": ["eval.repeats=1", "eval.steps=2", "eval.batches=[1,2]"]}


def measured(record: dict) -> list[dict]:
    """The rows of the evaluation's own."""
    return [row for row in record["evaluations"] if row["metric"] != "perplexity"]


@pytest.fixture
def magnitude(tiny, tmp_path) -> list[str]:
    """The words of a run that finds the yaml files of this file's evaluations beside the package's."""
    (tmp_path / "mine" / "eval").mkdir(parents=True)
    for node in (PACE, SURPRISE):
        (tmp_path / "mine" / "eval" / f"{node['name']}.yaml").write_text(yaml.safe_dump(node), encoding="utf-8")
    mine = f"hydra.searchpath=['file://{tmp_path / 'mine'}']"
    return [mine, *tiny, "method=magnitude", "sparsity=0.5", "losses=false"]


@pytest.mark.slow
@each
def test_the_figures_are_rows_of_the_record_and_columns_of_tables(magnitude, name, tmp_path):
    record = execute([*magnitude, f"eval={name}", *SMALL, *THRIFT.get(name, [])], tmp_path)
    rows = measured(record)
    assert rows and RecordForm.model_validate(record)
    found = figures.measures(record)
    columns = [figures._metric(row) for row in rows]
    assert len(set(columns)) == len(rows), "every figure has a name of its own"
    for row, column in zip(rows, columns, strict=True):
        assert row["protocol"] == name and isinstance(row["value"], float)
        better = {"lower": -1, "higher": 1, None: 0}[row["better"]]
        assert (found[column].value, found[column].better, found[column].shown) == (row["value"], better, row["shown"])
    shown = [row for row in rows if row["shown"]]
    lines = protocol.describe(rows)
    assert len(lines) == len(shown)
    for row, line in zip(shown, lines, strict=True):
        assert f"{row['metric']} {row['value']:.4g}" in line and row["dataset"] in line and (row["unit"] or "") in line
    assert f"eval={name} not in it" in plan(resolve(compose([*magnitude, f"eval={name}", *SMALL])))


@pytest.mark.slow
@each
def test_the_model_is_left_as_it_was(magnitude, name, tmp_path):
    saved = []
    for chosen, stream in (("none", False), (name, False), (name, True)):
        folder = tmp_path / f"{chosen}-{stream}"
        words = [f"eval={chosen}", *SMALL, *THRIFT.get(chosen, []), "save=true", f"stream={stream}"]
        record = execute([*magnitude, *words], folder)
        assert bool(measured(record)) == (chosen == name)
        saved.append(weights(folder))
    for again in saved[1:]:
        assert again.keys() == saved[0].keys()
        assert all(torch.equal(again[key], saved[0][key]) for key in again)


@each
def test_its_keys_name_the_run(magnitude, name):
    with_it = run_name(compose([*magnitude, f"eval={name}", *SMALL]))
    assert with_it == run_name(compose([*magnitude, f"eval={name}", *SMALL]))
    assert with_it != run_name(compose([*magnitude, "eval=perplexity", *SMALL]))


def test_a_figure_on_a_text_is_that_of_the_pruned_model(magnitude, tmp_path):
    record = execute([*magnitude, "eval=surprise", *SMALL], tmp_path)
    perplexity, surprise = record["evaluations"]
    assert surprise["value"] == pytest.approx(perplexity["value"], rel=1e-5)
    assert [surprise[key] for key in ("windows", "seqlen", "dataset")] == [3, 16, "local"]


@pytest.mark.slow
def test_rates_say_their_unit_and_that_more_is_better(magnitude, tmp_path, capsys):
    words = [*magnitude, "eval=pace", "eval.batches=[1,4]", "eval.seqlen=8"]
    record = execute(words, tmp_path)
    assert [(row["dataset"], row["metric"], row["unit"]) for row in record["evaluations"]] == [
        ("prefill", "batch 1", "tokens/s"),
        ("prefill", "batch 4", "tokens/s"),
    ]
    assert all(row["resident"] for row in record["evaluations"])
    assert figures.measures(record)["prefill batch 4, tokens/s"].better == 1
    assert " tokens/s on prefill" in capsys.readouterr().out
    assert " tokens/s, prefill batch 4" in _figures(record)
    dense = [*words, "method=dense"]
    assert run_name(compose(dense)) != run_name(compose([*dense, "eval.seqlen=9"]))
    whole, point = (run_name(compose([*words, f"eval.seconds={seconds}"])) for seconds in ("2", "2.0"))
    assert whole == point


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval=pace", "eval.batches=[0]"], "eval.batches=0 is not allowed: give a whole number from 1"),
        (["eval=pace", "eval._target_=alps_exp.baselines.wanda.Wanda"], "is no evaluation: name a class that derives"),
        (["eval=pace", "eval.batches=[64]"], "batches of 64 are too many"),
        (["eval=surprise", "eval.datasets=[]"], "eval=surprise measures on texts: name some"),
    ],
    ids=["value", "class", "check", "texts"],
)
def test_what_cannot_be_measured_is_refused_before_the_run(magnitude, words, message):
    with pytest.raises(UserError) as error:
        resolve(compose([*magnitude, *words]))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_field_that_the_class_lacks_is_named():
    node = {key: value for key, value in PACE.items() if key != "defaults"}
    assert build_evaluation(node) == Pace([1, 2])
    with pytest.raises(UserError, match="eval pace has no hyperparameter 'batch'; did you mean batches"):
        build_evaluation({**node, "batch": 1})


def test_a_yaml_without_the_keys_of_all_is_refused(magnitude, tmp_path):
    file = tmp_path / "mine" / "eval" / "pace.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in PACE.items() if key != "defaults"}))
    with pytest.raises(UserError, match="eval=pace has no batch_size: begin its defaults with - none"):
        compose([*magnitude, "eval=pace"])


def test_a_figure_says_which_way_is_better():
    with pytest.raises(UserError, match="better='more' is not allowed"):
        Figure("prefill", "batch 1", 1.0, "more")
