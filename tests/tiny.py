"""What tests of runs of a tiny model share: a run in this process, its saved weights, a model on its own."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from alps_exp.cli.overrides import compose
from alps_exp.runs import run
from alps_exp.runs.workspace import Workspace


def execute(settings: list[str], folder: Path, *more: str, workspace: Workspace | None = None) -> dict:
    """The record of a run in a folder, by the words of the command line."""
    return run.run(compose([*settings, *more]), folder, workspace)


def weights(folder: Path) -> dict[str, Tensor]:
    """The tensors that the run in a folder has saved, by name."""
    files = (folder / "model").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def load(folder: Path) -> nn.Module:
    """The model in a folder, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()
