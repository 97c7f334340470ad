"""Processes that prune one model together, each on a device of its own.

The calibration windows are split over them. A block's statistics are summed at the process that solves the layers they
belong to, which hands the pruned weights to all. What comes out is what one process would make, to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..base.errors import UserError
from ..calibration.capture import Accumulator

# A process helps another when it has less than this share of the other's work to do.
_IDLE = 0.6


class Alone:
    """A process that works by itself."""

    size, rank = 1, 0
    leads = True
    heavy: int | None = None
    share: tuple[int, ...] = ()

    def windows(self, tokens: Tensor) -> Tensor:
        """All of them."""
        return tokens

    def batches(self, sizes: Mapping[str, list[int]]) -> Mapping[str, list[int]]:
        """Windows of each forward of an earlier attempt, by stream."""
        return sizes

    def divide(self, groups: Sequence, costs: Sequence[float], parts: int = 0) -> list[int]:
        """All groups are this process's."""
        return list(range(len(groups)))

    def exchange(self, weights: Mapping[str, Tensor]) -> None:
        """They are all here."""

    def gather(self, rows: list) -> list:
        """These are all."""
        return rows

    def add(self, tensors: Sequence[Tensor]) -> None:
        """They are the sums."""

    def reduce(self, tensor: Tensor, owner: int) -> None:
        """It is the sum."""

    def spread(self, tensor: Tensor, owner: int) -> None:
        """It is here."""

    def tell(self, value: object) -> object:
        """It is its own."""
        return value


class Team:
    """One process's view of the processes that work together.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
        device: this process's.
        heavy: index of the costliest group among those divided last, the sums of which all have; None where no process
            has much less to do than its owner.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.heavy: int | None = None
        self._owners: dict[str, int] = {}
        self._shares: dict[int, list[int]] = {}
        self._sent: list[tuple[list[dist.Work], Tensor]] = []

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

    def windows(self, tokens: Tensor) -> Tensor:
        """This process's windows of `tokens` (windows, seqlen).

        Raises:
            UserError: fewer windows than processes.
        """
        if len(tokens) < self.size:
            raise UserError(f"devices={self.size} split {len(tokens)} windows: give at most as many devices (nsamples)")
        return tokens.tensor_split(self.size)[self.rank]

    def batches(self, sizes: Mapping[str, list[int]]) -> Mapping[str, list[int]]:
        """None: what one process has done says nothing about another's windows."""
        return {}

    def divide(
        self, groups: Sequence[tuple[list[str], Accumulator | None]], costs: Sequence[float], parts: int = 0
    ) -> list[int]:
        """Divide groups of layers among the processes, and sum each group's statistics where it is solved.

        Args:
            groups: layers that share an input, with this process's statistics of it; the others' are of no use
                afterwards.
            costs: of solving each group. The costliest goes first, each to the process with the least so far.
            parts: into how many parts the solver's work on a Gram matrix divides. Those of the heavy group go in equal
                numbers to its owner and to all that have much less to do.

        Returns:
            Indices of this process's groups.
        """
        loads, owners = [0.0] * self.size, [0] * len(groups)
        for index in sorted(range(len(groups)), key=lambda i: -costs[i]):
            owners[index] = min(range(self.size), key=loads.__getitem__)
            loads[owners[index]] += costs[index]
        self._divide_parts(owners, costs, loads, parts)
        for index, ((names, sums), owner) in enumerate(zip(groups, owners, strict=True)):
            self._owners |= dict.fromkeys(names, owner)
            if sums is not None:
                for tensor in sums.tensors():
                    dist.all_reduce(tensor) if index == self.heavy else dist.reduce(tensor, owner)
                counts = torch.tensor([sums.tokens, sums.sequences], device=self.device)
                dist.all_reduce(counts)
                sums.tokens, sums.sequences = counts.tolist()
        return [index for index, owner in enumerate(owners) if owner == self.rank]

    def _divide_parts(self, owners: list[int], costs: Sequence[float], loads: list[float], parts: int) -> None:
        self.heavy, self._shares = None, {}
        if not costs:
            return
        heavy = max(range(len(costs)), key=costs.__getitem__)
        owner = owners[heavy]
        idle = sorted((rank for rank in range(self.size) if loads[rank] < _IDLE * loads[owner]), key=loads.__getitem__)
        if idle:
            self.heavy = heavy
            workers = [owner, *idle][:parts]
            shares = torch.arange(parts).tensor_split(len(workers)) if workers else ()
            for rank, share in zip(workers, shares, strict=True):
                self._shares[rank] = share.tolist()

    def owner(self, name: str) -> int:
        """The process that solves a layer."""
        return self._owners[name]

    @property
    def share(self) -> list[int]:
        """Which parts of the heavy group this process makes."""
        return self._shares.get(self.rank, [])

    def hand_over(self, parts: Sequence[Tensor], names: Sequence[str]) -> None:
        """Send this process's parts to the owner of these layers, while this process goes on."""
        for part in map(Tensor.contiguous, parts):
            work = dist.batch_isend_irecv([dist.P2POp(dist.isend, part, self._owners[names[0]])])
            self._sent.append((work, part))

    def elsewhere(self, like: Tensor) -> dict[int, Callable[[], Tensor | None]]:
        """For the owner of the heavy group: the parts that others make, each with a function that waits for it.

        Args:
            like: of the parts' shape and dtype.

        Returns:
            Number of the part → function, to be called in this order; called again, it gives None.
        """
        return {
            index: _Awaited(rank, like) for rank, share in self._shares.items() if rank != self.rank for index in share
        }

    def exchange(self, weights: Mapping[str, Tensor]) -> None:
        """Give every process the weights that each has solved.

        Args:
            weights: by layer, those of all groups divided before; overwritten in place where another solved them.
        """
        for work in (work for works, _ in self._sent for work in works):
            work.wait()
        self._sent.clear()
        for name, weight in weights.items():
            dist.broadcast(weight, self._owners[name])

    def gather(self, rows: list) -> list:
        """What all processes have to say, each given its own part."""
        parts: list[list] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        for tensor in tensors:
            dist.all_reduce(tensor)

    def reduce(self, tensor: Tensor, owner: int) -> None:
        """Replace a tensor of process `owner` by its sum over the processes; the others' are of no use afterwards."""
        dist.reduce(tensor, owner)

    def spread(self, tensor: Tensor, owner: int) -> None:
        """Replace a tensor by that of process `owner`."""
        dist.broadcast(tensor, owner)

    def tell(self, value: object) -> object:
        """The leading process's value."""
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def leave(self) -> None:
        """Part from the others."""
        dist.destroy_process_group()


class _Awaited:
    """Waits for a tensor that another process sends; there is one to be had."""

    def __init__(self, rank: int, like: Tensor) -> None:
        self._rank, self._like = rank, like

    def __call__(self) -> Tensor | None:
        like, self._like = self._like, None
        if like is None:
            return None
        made = torch.empty_like(like)
        for work in dist.batch_isend_irecv([dist.P2POp(dist.irecv, made, self._rank)]):
            work.wait()
        return made
