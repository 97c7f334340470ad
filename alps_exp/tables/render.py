"""A table as Markdown, LaTeX, plain text, csv and parquet; the same table gives the same bytes."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from ..base.files import replacing
from .figures import Aggregate
from .layout import Cell, Grid

FORMATS = ("md", "csv", "tex", "parquet")


def write(found: Aggregate, grid: Grid, pictures: Sequence[Path], folder: Path, name: str) -> list[Path]:
    """Write NAME.md (with the pictures), NAME.csv, NAME.tex and NAME.parquet.

    csv and parquet hold every metric unrounded, one row per group and metric; Markdown and LaTeX the table.
    """
    numbers = found.frame.drop(columns=["better", "shown"])
    contents = {
        "md": markdown(grid, pictures),
        "csv": numbers.to_csv(index=False, lineterminator="\n"),
        "tex": latex(grid),
    }
    paths = [folder / f"{name}.{suffix}" for suffix in FORMATS]
    for path in paths:
        with replacing(path) as temporary:
            if path.suffix == ".parquet":
                numbers.to_parquet(temporary, engine="pyarrow", index=False)
            else:
                temporary.write_text(contents[path.suffix[1:]], encoding="utf-8")
    return paths


def markdown(grid: Grid, pictures: Sequence[Path] = ()) -> str:
    """As GitHub shows it; the notes below, then the pictures."""

    def shown(text: str) -> str:
        return re.sub(r"([\\|*_<>`])", r"\\\1", text)

    def cell(cell: Cell) -> str:
        return f"**{shown(cell.text)}**" if cell.best else shown(cell.text)

    headers = [shown(word) for word in (*grid.labels, *(_joined(words) for words in grid.header))]
    rows = [[*map(shown, labels), *map(cell, cells)] for labels, cells in _sparse(grid)]
    align = ["left"] * len(grid.labels) + ["right"] * len(grid.header)
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align) if rows else ""
    parts = [f"**{shown(grid.title)}**", table, *map(shown, grid.notes)]
    parts += [f"![{shown(picture.stem)}]({picture.name})" for picture in pictures if picture.suffix == ".png"]
    return "\n\n".join(parts) + "\n"


def latex(grid: Grid) -> str:
    """A table environment for booktabs, through pandas' Styler."""
    depth = max(map(len, grid.header))
    columns = [("",) * (depth - 1) + (label,) for label in grid.labels] + grid.header
    rows = [[*labels, *(cell.text for cell in cells)] for labels, cells in _sparse(grid)]
    frame = pd.DataFrame(rows, columns=pd.MultiIndex.from_tuples(columns) if depth > 1 else [c[0] for c in columns])
    best = [[False] * len(grid.labels) + [cell.best for cell in cells] for _, cells in grid.rows]
    marks = pd.DataFrame(best, columns=frame.columns).map(lambda bold: "textbf:--rwrap" if bold else "")
    styler = frame.style.hide(axis="index").format(_tex).apply(lambda _: marks, axis=None)
    for level in range(depth):
        styler.format_index(_tex, axis=1, level=level)
    text = styler.to_latex(
        caption=_tex(grid.title),
        column_format="l" * len(grid.labels) + "r" * len(grid.header),
        hrules=True,
        position_float="centering",
        multicol_align="c",
    )
    notes = "".join(f"\\par\\footnotesize {_tex(note)}\n" for note in grid.notes)
    return "% \\usepackage{booktabs}\n" + text.replace("\\end{table}\n", f"{notes}\\end{{table}}\n")


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
    "ρ": r"$\rho$",
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in text)


def plain(grid: Grid, width: int) -> str:
    """For a terminal of `width` columns: labels that do not vary are above the table, headers are broken at words, and
    columns that find no room follow below under the same labels. A * marks the best."""
    rows = [[*labels, *(f"{cell.text}{'*' * cell.best}" for cell in cells)] for labels, cells in _sparse(grid)]
    first = len(grid.labels)
    headers = [*grid.labels, *("\n".join(textwrap.wrap(_joined(words), 12)) for words in grid.header)]
    widths = [
        2 + max(max(map(len, header.split("\n"))), *(len(row[index]) for row in rows))
        for index, header in enumerate(headers)
    ]
    blocks: list[list[int]] = [[]]
    for index in range(first, len(headers)):
        if blocks[-1] and sum(widths[:first]) + sum(widths[i] for i in [*blocks[-1], index]) > width:
            blocks.append([])
        blocks[-1].append(index)
    tables = []
    for block in blocks:
        picked = [*range(first), *block]
        tables.append(
            tabulate(
                [[row[index] for index in picked] for row in rows],
                [headers[index] for index in picked],
                tablefmt="simple",
                disable_numparse=True,
                colalign=["left"] * first + ["right"] * len(block),
            )
        )
    notes = [textwrap.fill(note.replace("bold:", "*:").replace("Bold:", "*:"), width) for note in grid.notes]
    return "\n\n".join(part for part in (grid.title, *tables, "\n".join(notes)) if part)


def _joined(words: Sequence[str]) -> str:
    return ", ".join(word for word in words if word)


def _sparse(grid: Grid) -> list[tuple[list[str], list[Cell]]]:
    """The rows, where a label that repeats the one above it is left blank, but for the innermost."""
    found, before = [], [""] * len(grid.labels)
    for labels, cells in grid.rows:
        same = 0
        while same < len(labels) - 1 and labels[same] == before[same]:
            same += 1
        found.append(([""] * same + labels[same:], cells))
        before = labels
    return found
