"""What methods of block and model scope are. A method of layer scope is a `Solver`, which the block loop calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ..layer.method import Method
from ..model.blocks import BlockModel
from .job import PruneJob
from .rows import PruneResult
from .stages import Stage
from .tools import Tools


@dataclass(frozen=True)
class BlockMethod(Method, Stage):
    """Base of methods that prune a block as a whole: the block loop's only stage.

    `run` is given a `BlockProblem`. It captures what it needs of the layers' inputs (`capture`), and hands the weights
    of all layers to `BlockProblem.settle`, each exactly once.
    """


@dataclass(frozen=True)
class ModelMethod(Method, ABC):
    """Base of methods that prune the model as a whole."""

    @abstractmethod
    def run(self, model: BlockModel, job: PruneJob, tools: Tools) -> PruneResult:
        """Prune the model in place; of a streamed model, into the store's shards.

        Raises:
            UserError: NaN or infinite weights (of a model in memory before any layer is pruned) or activations (the
                layer or block is named), a model that is another one block by block (`faithful`), a layer that the
                method cannot solve, or a device whose memory does not suffice after every measure.
        """
