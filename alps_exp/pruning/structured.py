"""Pruning of whole channels and heads: which are asked for, and how their weights and biases become zero.

The sparsity of a layer is the share of its block's channels, or heads, that leave. It is asked of the writer, whose
inputs they are, and holds alike for the readers, whose rows make these inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..base.errors import UserError
from ..layer.inputs import Inputs
from ..layer.solver import Solution
from ..model.parts import Units, units_of
from ..model.structure import find_blocks
from ..patterns import Pattern
from .block import BlockProblem


def kept_of(count: int, sparsity: float) -> int:
    """How many of `count` units stay: int(count · (1 - sparsity))."""
    return math.floor(count * (1 - sparsity) + 1e-6)


def asked_units(block: nn.Module, name: str, patterns: Mapping[str, Pattern]) -> list[tuple[Units, Pattern]]:
    """The units of a block that are to be pruned, with the pattern of all their layers.

    Raises:
        UserError: layers to prune that are no part of units, units of which some layers are left out or have another
            sparsity, or of which none would stay.
    """
    own = {layer.removeprefix(f"{name}."): layer for layer in patterns if layer.startswith(f"{name}.")}
    found = []
    for units in units_of(block):
        asked = [path for path in units.layers if path in own]
        if not asked:
            continue
        several = {patterns[own[path]] for path in asked}
        if len(asked) < len(units.layers) or len(several) > 1:
            lacking = next((path for path in units.layers if path not in own), None)
            what = f"{lacking} is left out" if lacking else "they have different sparsities (layers.sparsity)"
            raise UserError(
                f"{', '.join(units.layers)} of {name} lose their {units.kind} together, and {what}: give all of them "
                "the same, or exclude all (layers.exclude=[...])"
            )
        pattern = several.pop()
        if not kept_of(units.count, pattern.sparsity):
            raise UserError(
                f"sparsity {pattern} leaves none of the {units.count} {units.kind} of {name}: give less, or exclude "
                f"{', '.join(units.layers)} (layers.exclude=[...])"
            )
        found.append((units, pattern))
        for path in units.layers:
            del own[path]
    if own:
        raise UserError(
            f"{name}.{next(iter(own))} is no part of separate heads (q_proj, k_proj, v_proj and o_proj) or of a "
            "feed-forward part of two or three linear layers: exclude it (layers.exclude=[...]), or choose another "
            "method"
        )
    return found


def check_units(model: nn.Module, patterns: Mapping[str, Pattern]) -> dict[str, list[tuple[Units, Pattern]]]:
    """The units to prune in each block by its name; raises what `asked_units` does."""
    prefix, blocks = find_blocks(model)
    names = {f"{prefix}.{index}": block for index, block in enumerate(blocks)}
    return {name: asked_units(block, name, patterns) for name, block in names.items()}


def settle_units(
    block: BlockProblem,
    units: Units,
    inputs: Inputs,
    kept: Tensor,
    solution: Solution,
    readers: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the writer's solution, and zero rows and biases of the readers.

    Args:
        block: the block.
        units: which leave or stay.
        inputs: of the writer.
        kept: (count,) bool.
        solution: of the writer, with zeros for all inputs of units that leave.
        readers: path of a reader → its weight (out, in), where it is another than the dense one.
    """
    stats = {**solution.stats, "unit": units.kind, "units": units.count, "kept": int(kept.sum())}
    name = f"{block.name}.{units.writer}"
    solution.stats.update(stats)
    solved = [block.solved(name, inputs, solution, sum(solution.seconds.values()))]
    rows = {path: kept.repeat_interleave(width) for path, width in units.readers.items()}
    for path, stay in rows.items():
        layer = block.layers[f"{block.name}.{path}"]
        support = stay[:, None].expand(layer.shape)
        weight = (readers or {}).get(path, layer.weight.float()).masked_fill(~support, 0)
        reader = Solution(weight, support, solution.status, solution.iterations, stats=dict(stats))
        solved.append(block.solved(layer.name, Inputs(name=layer.name), reader))
    block.settle(solved)
    zero_biases(block.module, rows)


@torch.no_grad()
def zero_biases(module: nn.Module, rows: Mapping[str, Tensor]) -> None:
    """Zero the biases of the rows that leave; path of a layer → (out,) bool, True where a row stays."""
    for path, stay in rows.items():
        if (bias := module.get_submodule(path).bias) is not None:
            bias.masked_fill_(~stay.to(bias.device), 0)


def removed_weights(rows: Iterable) -> int:
    """Weights that left with their units, of rows of a record whose `stats` tell of units."""
    return sum(
        math.prod(row.shape) * (row.stats["units"] - row.stats["kept"]) // row.stats["units"]
        for row in rows
        if "unit" in row.stats
    )
