"""alps_exp: one-shot pruning of language models, compared under one calibration and layer-wise loop."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"
__all__ = ["NM", "LayerProblem", "Pattern", "Solution", "Solver", "Unstructured", "prune_layer", "prune_model"]

# In a checkout (and an editable install) conf/, sweeps/ and baselines/ lie beside this package; in a wheel they lie
# inside it. Either way they are alps_exp.conf, alps_exp.sweeps and alps_exp.baselines, so that nothing of this project
# is a top-level module that another distribution's `baselines` could shadow (docs/decisions.md).
if not (Path(__file__).parent / "conf").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

from .api import prune_layer, prune_model  # noqa: E402
from .patterns import NM, Pattern, Unstructured  # noqa: E402
from .problem import LayerProblem  # noqa: E402
from .solver import Solution, Solver  # noqa: E402
