"""Task data of a few rows in the forms that the project reads, for the tiny models."""

from __future__ import annotations

import json
import random
from pathlib import Path

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


def build(root: Path) -> Path:
    """A folder for eval.task_source: three tasks of 30 rows, two subjects of MMLU, and three rows of GSM8K."""
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


def settings(model: Path, source: Path) -> list[str]:
    """Overrides to evaluate a model on three tasks of the folder."""
    local = ["model=local", f"model.path={model}", "device=cpu", "method=dense", "eval=zeroshot"]
    return [*local, f"eval.task_source={source}", "eval.tasks=[arc_easy,piqa,boolq]"]
