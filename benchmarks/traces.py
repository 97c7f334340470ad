"""Traces of runs as a table: mean relative loss and change of the support after so many iterations.

    python -m alps_exp -m +sweeps=traces
    python benchmarks/traces.py results/runs

Reads the records below the folder whose layers have a trace (method.trace=true). A layer that has stopped keeps its
last loss and changes nothing more. The change counts the entries that came into the support and those that left it in
that iteration, over its size.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

AT = (1, 2, 5, 10, 20, 40, 80, 160)


def rows(folder: Path) -> list[tuple[str, list[str]]]:
    """Of each run with traces, by name: its name, and its cells."""
    found = []
    for file in sorted(folder.glob("*/record.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        traces = [layer["stats"]["trace"] for layer in record["layers"] if "trace" in layer["stats"]]
        if not traces:
            continue
        method = record["config"]["method"]
        name = f"{record['method']} {record['sparsity']}"
        name += f", ρ {method['rho']:g}, growth {method['growth']:g}" if "rho" in method else ""
        found.append((name, [_cell(traces, number) for number in AT]))
    return sorted(found)


def _cell(traces: list[dict], number: int) -> str:
    if all(len(trace["loss"]) < number for trace in traces):
        return ""
    losses = [trace["loss"][min(number, len(trace["loss"])) - 1] for trace in traces]
    changes = [trace["change"][number - 1] if len(trace["change"]) >= number else 0.0 for trace in traces]
    mean = math.fsum(losses) / len(losses)
    return f"{mean:.4g}, {math.fsum(changes) / len(changes):.2%}"


def main() -> None:
    """Print a table of the traces below a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    found = rows(parser.parse_args().folder)
    if not found:
        sys.exit("no record there has traces: run with method.trace=true")
    print(f"| loss, change after iteration | {' | '.join(map(str, AT))} |")
    print("|---" * (len(AT) + 1) + "|")
    for name, cells in found:
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
