"""Processes that prune one model together, each on a device of its own.

The calibration windows are split over them. A block's statistics are summed at the process that solves the layers they
belong to, which hands the pruned weights to all. What comes out is what one process would make, to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError
from .statistics import Accumulator


class Team:
    """One process's view of the processes that work together.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
        device: this process's.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._owners: dict[str, int] = {}

    @classmethod
    def join(cls, device_type: str) -> Team:
        """Meet the other processes, by the environment that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR).

        Args:
            device_type: "cuda" (NCCL) or "cpu" (gloo).
        """
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device = torch.device("cpu")
        if device_type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
            torch.cuda.set_device(device)
        # One process may wait long for another that fetches a model; what hangs is ended from outside.
        options = {"timeout": timedelta(days=2)} | ({"device_id": device} if device_type == "cuda" else {})
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", rank=rank, world_size=size, **options)
        return cls(rank, size, device)

    @property
    def leads(self) -> bool:
        """Whether this process writes what the team makes."""
        return self.rank == 0

    def share(self, tokens: Tensor) -> Tensor:
        """This process's windows of `tokens` (windows, seqlen).

        Raises:
            UserError: fewer windows than processes.
        """
        if len(tokens) < self.size:
            raise UserError(f"devices={self.size} split {len(tokens)} windows: give at most as many devices (nsamples)")
        return tokens.tensor_split(self.size)[self.rank]

    def divide(self, groups: Sequence[tuple[list[str], Accumulator | None]], costs: Sequence[float]) -> list[int]:
        """Divide groups of layers among the processes, and sum each group's statistics where it is solved.

        Args:
            groups: layers that share an input, with this process's statistics of it; the others' are of no use
                afterwards.
            costs: of solving each group. The costliest goes first, each to the process with the least so far.

        Returns:
            Indices of this process's groups.
        """
        loads, owners = [0.0] * self.size, [0] * len(groups)
        for index in sorted(range(len(groups)), key=lambda i: -costs[i]):
            owners[index] = min(range(self.size), key=loads.__getitem__)
            loads[owners[index]] += costs[index]
        for (names, sums), owner in zip(groups, owners, strict=True):
            self._owners |= dict.fromkeys(names, owner)
            if sums is not None:
                for tensor in sums.tensors():
                    dist.reduce(tensor, owner)
                counts = torch.tensor([sums.tokens, sums.sequences], device=self.device)
                dist.all_reduce(counts)
                sums.tokens, sums.sequences = counts.tolist()
        return [index for index, owner in enumerate(owners) if owner == self.rank]

    def exchange(self, weights: Mapping[str, Tensor], rows: list) -> list:
        """Give every process the weights that each has solved.

        Args:
            weights: by layer, those of all groups divided before; overwritten in place where another solved them.
            rows: what this process has to say of its layers.

        Returns:
            The rows of all.
        """
        for name, weight in weights.items():
            dist.broadcast(weight, self._owners[name])
        parts: list[list] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def tell(self, value: object) -> object:
        """The leading process's value."""
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def leave(self) -> None:
        """Part from the others."""
        dist.destroy_process_group()
