"""The report as one HTML file: `python -m alps_exp.report`, `alps-exp report`, or `make report`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import UserError
from ..base.files import replacing
from ..runs.record import FILE as RECORD
from ..tables import archive

if TYPE_CHECKING:
    from . import gather

FILE = Path("results/report.html")
_NEEDS = {"altair": "altair", "vl_convert": "vl-convert-python", "itables": "itables"}


def page(sweeps: Sequence[gather.Sweep]) -> str:
    """The report of what was gathered; the same records and libraries give the same text.

    Raises:
        UserError: the packages that it needs are not installed.
    """
    if missing := [package for module, package in _NEEDS.items() if find_spec(module) is None]:
        raise UserError(f"the report needs {', '.join(missing)}: pip install 'alps-exp[report]'")
    import jinja2

    from ..patterns import written
    from ..tables.layout import number
    from . import gather
    from .charts import charts

    spec, ticked = charts(sweeps)
    runs = [run for sweep in sweeps for run in sweep.runs]
    patterns = sorted({run.record["sparsity"] for run in runs}, key=written.order)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("alps_exp.report", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {"facts": gather.facts, "behind": gather.behind, "worst": gather.worst, "sort": _sort_key}
    return environment.get_template("page.html").render(
        sweeps=sweeps,
        runs=runs,
        metrics=gather.columns(runs),
        number=number,
        known=lambda value: value is not None and math.isfinite(value),
        status=gather.status,
        place=patterns.index,
        spec=spec,
        ticked=set(ticked),
        vega=_vega(),
        tables=_datatables(),
    )


def _sort_key(text: str) -> str:
    """The number that a cell of means begins with, by which its column is sorted; nothing where there is none."""
    word = text.partition(" ")[0].rstrip("†‡§")
    try:
        return word if math.isfinite(float(word)) else ""
    except ValueError:
        return ""


@cache
def _vega() -> str:
    """Vega, Vega-Lite and their embedding, as one script that needs nothing else."""
    import vl_convert
    from altair import SCHEMA_VERSION

    return vl_convert.javascript_bundle(vl_version=".".join(SCHEMA_VERSION.split(".")[:2]))


def _datatables() -> dict[str, str]:
    """DataTables with its extensions as itables carries it: a module in base64, and its style sheet."""
    from itables import options

    script = Path(options.dt_bundle)
    style = script.with_suffix(".css").read_text(encoding="utf-8")
    return {"script": b64encode(script.read_bytes()).decode(), "style": style}


def _nothing(runs: Path | None) -> bool:
    """Whether there is no record, as far as files' names tell."""
    folder = runs or archive.RUNS
    kept = folder.name.endswith(archive.KEPT) or (runs is None and any(archive.RECORDS.glob(f"*{archive.KEPT}")))
    return not kept and not any(folder.rglob(RECORD))


def _sets(runs: Path | None) -> list[archive.RunSet]:
    """Sweeps, and last the runs of one's own that belong to none."""
    from ..tables.make import COMPARISON, sets_of  # imports pandas, which takes longer than `_nothing`

    found = sets_of(runs or archive.RUNS, archive.RECORDS if runs is None else None)
    *sets, own = found or [archive.RunSet("", [], [], "")]
    if own.name != COMPARISON:
        return [*sets, own]
    ours = {record["run"] for found in sets if found.origin.endswith(archive.MANIFEST) for record in found.records}
    rest = [record for record in own.records if record["run"] not in ours]
    return [*sets, dataclasses.replace(own, name="single runs", records=rest)] if rest or own.unreadable else sets


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; returns the exit status, 2 where there are no records or a package is missing."""
    parser = argparse.ArgumentParser(prog="python -m alps_exp.report", description="One HTML file from run records.")
    parser.add_argument("runs", nargs="?", type=Path, help=f"folder of run records, or a {archive.KEPT} file")
    parser.add_argument("--to", type=Path, default=FILE, help=f"the file to write ({FILE})")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        sets = [] if _nothing(options.runs) else _sets(options.runs)
        if not any(found.records for found in sets):
            raise UserError(f"no records below {options.runs or archive.RUNS}: run something first, such as make demo")
        from . import gather

        text = page(gather.gather(sets))
        with replacing(options.to) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        return _refuse(f"cannot read or write {error.filename} ({error.strerror}): name another file with --to")
    except UserError as error:
        return _refuse(str(error))
    for line in (line for found in sets for line in found.unreadable.values()):
        print(f"alps_exp: left out: {line}", file=sys.stderr)
    count, size = sum(len(found.records) for found in sets), options.to.stat().st_size / 1e6
    print(f"{options.to}: {count} runs, {size:.1f} MB in {time.perf_counter() - start:.1f} s; open it in a browser")
    return 0


def _refuse(message: str) -> int:
    print(f"alps_exp: {message}", file=sys.stderr)
    return 2
