"""Tasks through lm-eval on networks in memory: requests and scores as lm-eval's own, rows chosen."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import tiny_models
import tiny_tasks
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alps_exp.base.errors import UserError
from alps_exp.cli.overrides import compose
from alps_exp.runs import run as runs
from alps_exp.runs.settings import resolve
from alps_exp.runs.workspace import Workspace
from alps_exp.tables import figures


def scores(record: dict) -> dict:
    return {(row["dataset"], row["metric"]): row for row in record["evaluations"]}


def reference(source: Path, folder: Path, model: Path, names: list[str]) -> dict:
    """lm-eval's own run over the same rows: the function behind `lm_eval run --include_path FOLDER`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    def rows(name):
        return [json.loads(line) for line in (source / name).read_text().splitlines()]

    files = {"arc_easy": "arc/arc_easy.yaml", "piqa": "piqa/piqa.yaml", "boolq": "super_glue/boolq/default.yaml"}
    splits = {"arc_easy": "test", "piqa": "validation", "boolq": "validation"}
    converted = {
        "arc_easy": [
            {
                "question": row["question"],
                "choices": {"text": row["choices"], "label": list("1234")},
                "answerKey": "1234"[row["gold"]],
            }
            for row in rows("arc_easy/test.jsonl")
        ],
        "piqa": rows("piqa/validation.jsonl"),
        "boolq": [{**row, "label": int(row["answer"])} for row in rows("boolq/validation.jsonl")],
    }
    for name in names:
        tiny_tasks.write(folder / f"{name}.jsonl", converted[name])
        node = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / files[name]),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {splits[name]: str(folder / f"{name}.jsonl")}},
            "training_split": None,
            "validation_split": "validation" if splits[name] == "validation" else None,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(node))
    return lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        device="cpu",
        batch_size=4,
        tasks=names,
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        bootstrap_iters=10,
    )


@pytest.mark.slow
def test_requests_and_scores_are_those_of_lm_eval(settings, source, tiny_llama, tmp_path, monkeypatch):
    from alps_exp.evaluation.task_model import TaskModel

    seen = {}
    own = TaskModel.loglikelihood

    def spy(self, requests, *rest):
        results = own(self, requests, *rest)
        for request, result in zip(requests, results, strict=True):
            seen.setdefault(request.task_name, []).append((request.args, result))
        return results

    monkeypatch.setattr(TaskModel, "loglikelihood", spy)
    record = runs.run(compose(settings), tmp_path / "run")
    names = ["arc_easy", "piqa", "boolq"]
    wanted = reference(source, tmp_path / "reference", tiny_llama, names)
    for name in names:
        samples = sorted(wanted["samples"][name], key=lambda sample: sample["doc_id"])
        expected = (
            [
                (tuple(arguments.values()), result)
                for sample in samples
                for arguments, (result,) in zip(sample["arguments"].values(), sample["resps"], strict=True)
            ]
            if isinstance(samples[0]["arguments"], dict)
            else [
                (tuple(arguments), result)
                for sample in samples
                for arguments, (result,) in zip(sample["arguments"], sample["resps"], strict=True)
            ]
        )
        assert [arguments for arguments, _ in seen[name]] == [arguments for arguments, _ in expected]
        for (_, (value, greedy)), (_, (other, other_greedy)) in zip(seen[name], expected, strict=True):
            assert float(value) == pytest.approx(float(other), abs=1e-4)
            assert str(greedy) == str(other_greedy)
        for metric in ("acc", "acc_norm") if name != "boolq" else ("acc",):
            row = scores(record)[name, metric]
            assert row["value"] == wanted["results"][name][f"{metric},none"]
            assert row["stderr"] == pytest.approx(wanted["results"][name][f"{metric}_stderr,none"])
            assert row["better"] == "higher"
            assert row["samples"] == row["total_samples"] == 30 and not row["partial"]


@pytest.mark.slow
def test_rows_of_the_record_and_columns_of_tables(settings, tmp_path, capsys):
    record = runs.run(compose([*settings, "eval.limit={piqa:7}", "eval.limit_seed=3"]), tmp_path / "run")
    row = scores(record)["piqa", "acc"]
    assert row["samples"] == 7 and row["total_samples"] == 30 and row["partial"] and row["shots"] == 0
    assert row["sampling"] == "7 of 30 at random, seed 3" and row["split"] == "validation" and row["truncated"] == 0
    assert row["source"].startswith("piqa/validation.jsonl (sha256 ") and row["protocol"].startswith("lm-eval 0.4")
    assert row["bos"] == "auto: the tokenizer adds <s> to each text"
    assert scores(record)["arc_easy", "acc"]["sampling"] == "all of 30"
    assert "on piqa (7 of 30 examples, partial)" in capsys.readouterr().out
    measured = figures.aggregate([record]).frame.set_index("metric")
    assert {"arc_easy acc", "boolq acc", "piqa acc (7 of 30)"} <= set(measured.index[measured["shown"]])
    assert not measured.loc["arc_easy acc_norm", "shown"] and measured.loc["arc_easy acc_norm", "stderr"] > 0
    # All rows have what tables and loggers read.
    for item in record["evaluations"]:
        assert {"dataset", "metric", "value", "stderr", "shown", "protocol", "partial", "source", "bos"} <= set(item)


@pytest.mark.slow
def test_a_seeded_sample_is_those_rows_and_always_the_same(settings, tmp_path, source):
    from alps_exp.evaluation import tasks

    def chosen(*more):
        asked = resolve(compose([*settings, "eval.tasks=[arc_easy]", *more]))
        return tasks.prepare(asked.model, asked.evaluation.tasks)[0]

    drawn = chosen("eval.limit=8", "eval.limit_seed=5").samples["arc_easy"]
    assert drawn == chosen("eval.limit=8", "eval.limit_seed=5").samples["arc_easy"]
    assert drawn != chosen("eval.limit=8", "eval.limit_seed=6").samples["arc_easy"] and len(set(drawn)) == 8
    assert chosen("eval.limit=8").samples["arc_easy"] == list(range(8))
    assert not chosen("eval.limit=30").samples
    # The score of the sample is that of a folder with these rows alone.
    rows = (source / "arc_easy/test.jsonl").read_text().splitlines()
    (tmp_path / "few/arc_easy").mkdir(parents=True)
    (tmp_path / "few/arc_easy/test.jsonl").write_text("\n".join(rows[index] for index in drawn) + "\n")
    words = [*settings, "eval.tasks=[arc_easy]"]
    sample = runs.run(compose([*words, "eval.limit=8", "eval.limit_seed=5"]), tmp_path / "sample")
    alone = runs.run(compose([*words, f"eval.task_source={tmp_path / 'few'}"]), tmp_path / "alone")
    assert [row["value"] for row in sample["evaluations"]] == [row["value"] for row in alone["evaluations"]]


@pytest.mark.slow
def test_tasks_are_prepared_once_until_the_tokenizer_changes(tiny_llama, source, tmp_path):
    from alps_exp.evaluation import tasks

    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    asked = resolve(compose([*tiny_tasks.settings(model, source), "eval.tasks=[arc_easy]"]))
    passes = tasks.prepare(asked.model, asked.evaluation.tasks)
    assert tasks.prepare(asked.model, asked.evaluation.tasks) is passes
    for file in model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        tasks.prepare(asked.model, asked.evaluation.tasks)


@pytest.mark.slow
def test_the_batch_size_is_found_and_changes_nothing(settings, tmp_path, monkeypatch):
    from alps_exp.evaluation import tasks

    fixed = runs.run(compose([*settings, "eval.task_batch_size=3"]), tmp_path / "fixed")
    monkeypatch.setattr(tasks, "_CPU_BATCH", "auto")  # as on a GPU
    monkeypatch.setattr(tasks, "_MOST_BATCH", 8)
    found = runs.run(compose(settings), tmp_path / "found")
    assert [row["value"] for row in found["evaluations"]] == [row["value"] for row in fixed["evaluations"]]


@pytest.mark.slow
def test_groups_and_examples_in_the_prompt(settings, tmp_path, source, monkeypatch):
    from alps_exp.evaluation.task_model import TaskModel

    contexts = []
    own = TaskModel.loglikelihood
    monkeypatch.setattr(
        TaskModel,
        "loglikelihood",
        lambda self, requests, *rest: contexts.append(requests[0].args[0]) or own(self, requests, *rest),
    )
    names = "eval.tasks=[mmlu_anatomy,mmlu_virology,mmlu_anatomy@2]"
    record = runs.run(compose([*settings, names, "eval.truncate=true"]), tmp_path)
    found = scores(record)
    assert found["mmlu_anatomy", "acc"]["shots"] == 0 and found["mmlu_anatomy@2", "acc"]["shots"] == 2
    assert found["mmlu_anatomy", "acc"]["total_samples"] == 4
    assert found["mmlu_anatomy@2", "acc"]["truncated"] > 0
    dev = tiny_tasks.questions(5, 2)
    assert contexts[1].index(dev[0][0]) < contexts[1].index(dev[1][0])
    assert contexts[0].count("Answer:") == 1 and contexts[1].count("Answer:") == 3


@pytest.mark.slow
def test_generation(settings, tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "longer")
    config = AutoConfig.from_pretrained(tiny_llama)
    config.max_position_embeddings = 1024
    config.save_pretrained(tmp_path / "longer")
    words = [*settings, f"model.path={tmp_path / 'longer'}", "eval.tasks=[gsm8k@0]", "eval.limit=2"]
    record = runs.run(compose(words), tmp_path / "run")
    found = scores(record)
    strict = found["gsm8k@0", "exact_match (strict-match)"]
    assert strict["shown"] and not found["gsm8k@0", "exact_match (flexible-extract)"]["shown"]
    assert strict["value"] == 0 and strict["samples"] == 2


@pytest.mark.slow
def test_a_random_model_guesses(settings, tiny_qwen3, tmp_path):
    generator = random.Random(7)
    rows = [
        {"goal": q, "sol1": c[0], "sol2": c[1], "label": generator.randrange(2)}
        for q, c, _ in tiny_tasks.questions(300, 8)
    ]
    tiny_tasks.write(tmp_path / "data/piqa/validation.jsonl", rows)
    words = [f"model.path={tiny_qwen3}", f"eval.task_source={tmp_path / 'data'}", "eval.tasks=[piqa]"]
    row = scores(runs.run(compose([*settings, *words]), tmp_path / "run"))["piqa", "acc"]
    assert row["stderr"] == pytest.approx(0.0289, abs=1e-3)
    assert abs(row["value"] - 0.5) < 4 * row["stderr"]


@pytest.mark.slow
def test_a_saved_pruned_model_is_evaluated_as_it_is(settings, tmp_path, text_file, monkeypatch):
    calibration = ["data=local", f"data.path={text_file}", "nsamples=4", "seqlen=64", "method=magnitude", "save=true"]
    words = ["eval.datasets=[local]", f"eval.path={text_file}", "eval.windows=4", "eval.seqlen=64"]
    pruned = runs.run(compose([*settings, *words, *calibration]), tmp_path / "pruned")
    monkeypatch.setattr(Workspace, "calibration", lambda *_: pytest.fail("calibration texts were read"))
    # No calibration text is named here, and seqlen=2048 is beyond the model: neither is needed.
    words = [*words, f"model.path={tmp_path / 'pruned/model'}", "data=local"]
    again = runs.run(compose([*settings, *words]), tmp_path / "again")
    assert [row["value"] for row in again["evaluations"]] == [row["value"] for row in pruned["evaluations"]]
    assert again["layers"] == [] and again["calibration"] == {}


def test_the_tokenizer_is_left_as_it_was(settings, tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "plain")
    workspace = Workspace()
    cfg = compose([*settings, f"model.path={tmp_path / 'plain'}", "eval.tasks=[piqa]", "eval.limit=5"])
    runs.run(cfg, tmp_path / "run", workspace)
    assert workspace.tokenizer(resolve(cfg)).pad_token is None


def test_bos_reaches_the_prompts(tiny_qwen3):
    from alps_exp.evaluation.task_model import TaskModel

    network, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_qwen3), AutoTokenizer.from_pretrained(tiny_qwen3)

    def encode(rule):
        model = TaskModel(network, tokenizer, torch.device("cpu"), 4, 4, 256, rule)
        return model.tok_encode("a boat"), model.tok_batch_encode(["a boat"])[0][0].tolist(), model.describe_bos()

    plain = tokenizer("a boat", add_special_tokens=False).input_ids
    assert encode("auto") == (plain, plain, "auto: the tokenizer adds none")
    wanted = [tokenizer.bos_token_id, *plain]
    for rule in (True, "window"):
        assert encode(rule) == (wanted, wanted, "BOS before each text")


def test_options_are_checked_without_lm_eval_where_there_are_no_tasks(settings, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "alps_exp.evaluation.tasks", None)
    resolve(compose([*settings, "eval.tasks=[]"]))


@pytest.mark.slow
def test_a_tokenizer_that_ends_each_text_is_refused(settings, tiny_llama, tmp_path):
    """lm-eval would take a continuation's tokens from behind an end that its context does not have."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    file = tmp_path / "model/tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    content["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    file.write_text(json.dumps(content))
    words = [*settings, f"model.path={tmp_path / 'model'}", "eval.tasks=[piqa]"]
    with pytest.raises(UserError, match=r"adds </s> after each text: give eval\.bos=false"):
        resolve(compose(words))
    for rule in ("true", "false"):
        resolve(compose([*words, f"eval.bos={rule}"]))


@pytest.mark.slow
def test_tokens_beyond_the_vocabulary(settings, tiny_llama, tmp_path):
    """A padding token may be: nothing reads it. A word of a prompt may not."""
    for name in ("pad", "word"):
        shutil.copytree(tiny_llama, tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        if name == "pad":
            tokenizer.add_special_tokens({"pad_token": "<padding>"})
        else:
            tokenizer.add_tokens(["sailor"])
        tokenizer.save_pretrained(tmp_path / name)
    with pytest.raises(UserError, match="task piqa has the token 'sailor', whose id 384"):
        resolve(compose([*settings, f"model.path={tmp_path / 'word'}", "eval.tasks=[piqa]"]))
    found, wanted = (
        runs.run(compose([*settings, f"model.path={model}", "eval.tasks=[piqa]"]), tmp_path / f"run-{model.name}")
        for model in (tmp_path / "pad", tiny_llama)
    )
    assert [row["value"] for row in found["evaluations"]] == [row["value"] for row in wanted["evaluations"]]
    assert not found["warnings"]
    from alps_exp.evaluation.task_model import TaskModel

    network, tokenizer = (kind.from_pretrained(tmp_path / "pad") for kind in (AutoModelForCausalLM, AutoTokenizer))
    model = TaskModel(network, tokenizer, torch.device("cpu"), 4, 4, 256, "auto")
    assert int(model.tok_batch_encode(["a boat by the river", "a"])[0].max()) < tiny_models.VOCABULARY
