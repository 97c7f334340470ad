"""Loads what runs need; a kept workspace serves several runs of the same model and texts."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..base.memory import free_host
from ..data import windows
from ..evaluation import perplexity, protocol
from ..model import loading, tokenization
from ..model.blocks import BlockModel
from ..model.structure import find_blocks


class Workspace:
    """Tokenizer, windows and network of a configuration.

    Args:
        keep: keep the network in memory, with a copy of all that its decoder blocks hold, and hand it out restored.

    Attributes:
        keep: likewise; whether other runs of a sweep follow.
    """

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self._texts: dict[str, tuple[Tensor, dict]] = {}
        self._tokenizers: dict[str, object] = {}
        self._samples: dict[str, str | None] = {}
        self._network: tuple[str, torch.nn.Module, dict[str, Tensor]] | None = None

    def tokenizer(self, cfg: Mapping):
        """The model's tokenizer."""
        key = _key(cfg["model"])
        if key not in self._tokenizers:
            self._tokenizers[key] = loading.load_tokenizer(cfg["model"])
        return self._tokenizers[key]

    def calibration(self, cfg: Mapping) -> tuple[Tensor, dict]:
        """Calibration windows (nsamples + data.holdout, seqlen), those to hold out last, and where they came from."""
        key = _key(cfg["model"], cfg["data"], cfg["nsamples"], cfg["seqlen"], cfg["seed"])
        if key not in self._texts:
            self._texts[key] = windows.calibration_tokens(
                cfg["data"],
                self.tokenizer(cfg),
                nsamples=cfg["nsamples"],
                holdout=cfg["data"]["holdout"],
                seqlen=cfg["seqlen"],
                seed=cfg["seed"],
                bos=cfg["model"]["bos"],
                vocabulary=_vocabulary(cfg),
            )
        return self._texts[key]

    def evaluation(self, cfg: Mapping, name: str) -> tuple[Tensor, dict]:
        """Evaluation windows (windows, seqlen) of the data set `name`, and where they came from."""
        options, seqlen = cfg["eval"], protocol.seqlen(cfg)
        path = protocol.local_path(options, name)
        node = cfg["data"] if name == cfg["data"]["name"] else windows.data_node(name)
        key = _key(cfg["model"], node, seqlen, options["windows"], options["bos"], path)
        if key not in self._texts:
            self._texts[key] = windows.evaluation_tokens(
                node,
                self.tokenizer(cfg),
                seqlen=seqlen,
                windows=options["windows"],
                bos=options["bos"],
                path=path,
                vocabulary=_vocabulary(cfg),
            )
        return self._texts[key]

    def prepared(self, cfg: Mapping) -> protocol.Prepared:
        """The texts and tasks that a configuration's evaluation reads.

        Raises:
            UserError: see `windows.evaluation_tokens` and `tasks.prepare`.
        """
        texts = [(name, *self.evaluation(cfg, name)) for name in cfg["eval"]["datasets"]]
        passes = ()
        if cfg["eval"]["tasks"]:
            from ..evaluation import tasks

            passes = tasks.prepare(cfg)
        return protocol.Prepared(texts, passes)

    def network(self, cfg: Mapping, dtype: torch.dtype | str) -> torch.nn.Module:
        """The dense model on the host, in evaluation mode."""
        if not self._holds(cfg, dtype):
            self._release()
            network = loading.load_model(cfg["model"], dtype)
            if not self.keep:
                return network
            prefix, _ = find_blocks(network)
            pristine = {
                name: tensor.detach().cpu().clone()
                for name, tensor in _tensors(network).items()
                if name.startswith(f"{prefix}.")
            }
            self._network = (_key(cfg["model"], str(dtype)), network, pristine)
        _, network, pristine = self._network
        held = _tensors(network)
        for name, tensor in pristine.items():
            held[name].data.copy_(tensor)
        return network

    def _holds(self, cfg: Mapping, dtype: torch.dtype | str) -> bool:
        """Whether the network is here from an earlier run."""
        return self._network is not None and self._network[0] == _key(cfg["model"], str(dtype))

    def _release(self) -> None:
        self._network = None
        gc.collect()  # networks refer to themselves

    def model(self, cfg: Mapping, device: torch.device, dtype: torch.dtype | str, scratch: Path) -> BlockModel:
        """The dense model, in memory as a whole or streamed from its files.

        Args:
            cfg: the configuration.
            device: where the blocks compute.
            dtype: of the weights; "auto" is the checkpoint's own.
            scratch: folder for hidden states on disk.
        """
        options = {"hidden_states": cfg["hidden_states"], "scratch": scratch}
        if not self._holds(cfg, dtype):
            self._release()  # before it is asked how much memory is free
        if cfg["stream"] is True or (not self._holds(cfg, dtype) and streams(cfg, dtype, 2 if self.keep else 1)):
            network, source = loading.load_streamed(cfg["model"], dtype, pin=device.type == "cuda")
            return BlockModel(network, device, source=source, **options)
        return BlockModel(self.network(cfg, dtype), device, **options)

    def dense_sample(self, cfg: Mapping, model: BlockModel) -> str | None:
        """The dense model's continuation of the prompt."""
        key = _key(cfg["model"], cfg["eval"]["prompt"], cfg["eval"]["sample_tokens"], str(model.model.dtype))
        if key not in self._samples:
            options = cfg["eval"]
            self._samples[key] = perplexity.sample(
                model, self.tokenizer(cfg), options["prompt"], options["sample_tokens"]
            )
        return self._samples[key]


@cache
def shared() -> Workspace:
    """The workspace that all runs of a sweep in this process share."""
    return Workspace(keep=True)


def streams(cfg: Mapping, dtype: torch.dtype | str, copies: int = 1) -> bool:
    """Whether the blocks are read from files one at a time: as asked, or where `copies` of the model would fill half of
    the free host memory and finished blocks are kept on disk."""
    if cfg["stream"] != "auto":
        return cfg["stream"]
    config = loading.load_config(cfg["model"])
    if dtype == "auto":
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    size = sum(parameter.numel() for parameter in loading.empty_model(cfg["model"]).parameters()) * dtype.itemsize
    return cfg["resumable"] and copies * size > 0.5 * free_host()


def _tensors(network: torch.nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, also those buffers that a checkpoint does not have."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _vocabulary(cfg: Mapping) -> int | None:
    return tokenization.vocabulary_of(loading.load_config(cfg["model"]))


def _key(*parts) -> str:
    return json.dumps(parts, sort_keys=True, default=str)
