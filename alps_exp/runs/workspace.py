"""Loads what runs need; a kept workspace serves several runs of the same model and texts."""

from __future__ import annotations

import gc
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..base.errors import UserError
from ..base.memory import free_host
from ..data import generated, windows
from ..data.settings import CalibrationSettings, GeneratedSettings
from ..evaluation import perplexity, protocol
from ..evaluation.evaluation import Text
from ..evaluation.settings import EvaluationText
from ..model import loading
from ..model.blocks import BlockModel, Known
from .settings import Settings


class Workspace:
    """Tokenizers, windows and the network that runs are made of.

    Args:
        keep: keep the network in memory, with a copy of all that it holds, and hand it out restored.

    Attributes:
        keep: likewise; whether other runs of a sweep follow.
    """

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self._texts: dict[tuple, tuple[Tensor, dict]] = {}
        self._tokenizers: dict[loading.ModelSource, object] = {}
        self._samples: dict[tuple, str | None] = {}
        self._network: tuple[tuple, torch.nn.Module, dict[str, Tensor]] | None = None
        self._known: dict[torch.device, Known] = {}

    def tokenizer(self, settings: Settings):
        """The model's tokenizer."""
        source = settings.model.source
        if source not in self._tokenizers:
            self._tokenizers[source] = loading.load_tokenizer(source)
        return self._tokenizers[source]

    def calibration(self, settings: Settings) -> tuple[Tensor, dict]:
        """Calibration windows (nsamples + data.holdout + fresh + training, seqlen), in this order, and where they came
        from."""
        asked = settings.calibration
        if isinstance(asked.data, GeneratedSettings):
            return self.generated(settings, asked)
        key = settings.model.source, asked, settings.device, settings.dtype
        if key not in self._texts:
            self._texts[key] = windows.calibration_tokens(
                asked.data,
                self.tokenizer(settings),
                nsamples=asked.nsamples,
                holdout=asked.data.holdout,
                fresh=asked.fresh,
                training=asked.training,
                seqlen=asked.seqlen,
                seed=asked.seed,
                bos=asked.bos,
                vocabulary=settings.model.vocabulary,
            )
        return self._texts[key]

    def generated(self, settings: Settings, asked: CalibrationSettings) -> tuple[Tensor, dict]:
        """Windows that the dense model writes, and where they came from."""
        key = settings.model.source, asked, settings.device, settings.dtype
        if key not in self._texts:
            self._texts[key] = generated.generated_tokens(
                asked,
                settings.model,
                self.tokenizer(settings),
                lambda: self._author(settings),
                settings.device,
                settings.dtype,
            )
        return self._texts[key]

    def _author(self, settings: Settings) -> torch.nn.Module:
        """The dense model as a whole, which writes text.

        Raises:
            UserError: it is too large for that.
        """
        if not self._holds(settings) and streams(settings, 2 if self.keep else 1):
            raise UserError(
                "data=generated needs the whole model in memory to write text, and this one would be streamed: give "
                "stream=false, or a text (data=c4, data=local)"
            )
        return self.network(settings)

    def evaluation(self, settings: Settings, text: EvaluationText) -> tuple[Tensor, dict]:
        """Evaluation windows (windows, seqlen) of a text, and where they came from."""
        asked = settings.evaluation
        key = settings.model.source, text, asked.seqlen, asked.windows, asked.bos
        if key not in self._texts:
            self._texts[key] = windows.evaluation_tokens(
                text.data,
                self.tokenizer(settings),
                seqlen=asked.seqlen,
                windows=asked.windows,
                bos=asked.bos,
                path=text.path,
                vocabulary=settings.model.vocabulary,
            )
        return self._texts[key]

    def prepared(self, settings: Settings) -> protocol.Prepared:
        """The texts and tasks that an evaluation reads.

        Raises:
            UserError: see `windows.evaluation_tokens` and `tasks.prepare`.
        """
        asked = settings.evaluation
        texts, passes = [Text(text.data.name, *self.evaluation(settings, text)) for text in asked.texts], ()
        if asked.tasks.names:
            from ..evaluation import tasks

            passes = tasks.prepare(settings.model, asked.tasks)
        return protocol.Prepared(texts, passes)

    def network(self, settings: Settings) -> torch.nn.Module:
        """The dense model on the host, in evaluation mode."""
        if not self._holds(settings):
            self._release()
            network = loading.load_model(settings.model, settings.dtype)
            if not self.keep:
                return network
            # What lies outside the blocks too: methods that train the model change it.
            pristine = {name: tensor.detach().cpu().clone() for name, tensor in _tensors(network).items()}
            self._network = (settings.model.source, settings.dtype), network, pristine
        _, network, pristine = self._network
        held = _tensors(network)
        for name, tensor in pristine.items():
            held[name].data.copy_(tensor)
        return network

    def _holds(self, settings: Settings) -> bool:
        """Whether the network is here from an earlier run."""
        return self._network is not None and self._network[0] == (settings.model.source, settings.dtype)

    def _release(self) -> None:
        self._network, self._known = None, {}
        gc.collect()  # networks refer to themselves

    def model(self, settings: Settings, device: torch.device, scratch: Path) -> BlockModel:
        """The dense model, in memory as a whole or streamed from its files.

        Args:
            settings: the run's.
            device: where the blocks compute.
            scratch: folder for hidden states on disk.
        """
        options = {"hidden_states": settings.hidden_states, "scratch": scratch}
        if not self._holds(settings):
            self._release()  # before it is asked how much memory is free
        if settings.stream is True or (not self._holds(settings) and streams(settings, 2 if self.keep else 1)):
            network, source = loading.load_streamed(settings.model, settings.dtype, pin=device.type == "cuda")
            return BlockModel(network, device, source=source, **options)
        network = self.network(settings)  # where it is kept, it is compared with its blocks once for all runs
        known = self._known.setdefault(device, Known()) if self.keep else None
        return BlockModel(network, device, **options, known=known)

    def dense_sample(self, settings: Settings, model: BlockModel) -> str | None:
        """The dense model's continuation of the prompt."""
        asked = settings.evaluation
        key = settings.model.source, asked.prompt, asked.sample_tokens, model.model.dtype
        if key not in self._samples:
            self._samples[key] = perplexity.sample(model, self.tokenizer(settings), asked.prompt, asked.sample_tokens)
        return self._samples[key]


@cache
def shared() -> Workspace:
    """The workspace that all runs of a sweep in this process share."""
    return Workspace(keep=True)


def streams(settings: Settings, copies: int = 1) -> bool:
    """Whether the blocks are read from files one at a time: as asked, or where `copies` of the model would fill half of
    the free host memory and finished blocks are kept on disk."""
    if settings.stream != "auto":
        return settings.stream
    size = sum(parameter.numel() for parameter in settings.model.skeleton.parameters()) * settings.itemsize
    return settings.resumable and copies * size > 0.5 * free_host()


def _tensors(network: torch.nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, also those buffers that a checkpoint does not have."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}
