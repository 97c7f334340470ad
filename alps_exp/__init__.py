"""alps_exp: one-shot pruning of language models, compared under one calibration and layer-wise loop."""

from __future__ import annotations

import os.path
from importlib import import_module

__version__ = "0.1.0"
__all__ = [
    "NM",
    "BlockMethod",
    "Evaluation",
    "Figure",
    "Inputs",
    "LayerProblem",
    "LayerSolver",
    "Method",
    "ModelMethod",
    "Pattern",
    "Solution",
    "Solver",
    "Statistics",
    "Unstructured",
    "UserError",
    "generate_tokens",
    "load_packed",
    "prune_layer",
    "prune_model",
    "require",
]

# In a checkout (and an editable install) conf/, sweeps/ and baselines/ lie beside this package; in a wheel they lie
# inside it. Either way they are alps_exp.conf, alps_exp.sweeps and alps_exp.baselines, so that nothing of this project
# is a top-level module that another distribution's `baselines` could shadow (docs/decisions.md).
_FOLDER = os.path.dirname(__file__)
if not os.path.isdir(os.path.join(_FOLDER, "conf")):
    __path__.append(os.path.dirname(_FOLDER))

# As typing's, which takes a while to import: an interrupt shall meet `streams.settle` as early as it can.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from .api import generate_tokens, load_packed, prune_layer, prune_model
    from .base.checks import require
    from .base.errors import UserError
    from .evaluation.evaluation import Evaluation, Figure
    from .layer.inputs import Inputs, Statistics
    from .layer.method import Method
    from .layer.problem import LayerProblem
    from .layer.solver import LayerSolver, Solution, Solver
    from .patterns import NM, Pattern, Unstructured
    from .pruning.method import BlockMethod, ModelMethod

_HOMES = {
    "prune_layer": "api",
    "prune_model": "api",
    "load_packed": "api",
    "generate_tokens": "api",
    "require": "base.checks",
    "UserError": "base.errors",
    "NM": "patterns",
    "Pattern": "patterns",
    "Unstructured": "patterns",
    "Inputs": "layer.inputs",
    "LayerProblem": "layer.problem",
    "Statistics": "layer.inputs",
    "LayerSolver": "layer.solver",
    "Method": "layer.method",
    "BlockMethod": "pruning.method",
    "ModelMethod": "pruning.method",
    "Solution": "layer.solver",
    "Solver": "layer.solver",
    "Evaluation": "evaluation.evaluation",
    "Figure": "evaluation.evaluation",
}


def __getattr__(name: str):
    # Most of these need torch, whose import takes seconds: the command line answers most questions without it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
