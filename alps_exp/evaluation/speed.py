"""What the model costs to run: tokens per second, memory, bytes on disk; dense and in the forms that pruning allows."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from ..base.checks import one_of, require
from ..base.errors import UserError, first_line
from ..checkpoints.packed import stored_size
from ..model.blocks import BlockModel
from ..model.loading import context_length
from ..model.resident import FORMS, nbytes, resident_as
from ..numerics.graphs import recorded
from .evaluation import Evaluation, Figure
from .perplexity import whole_model

_MEBIBYTE = 2**20


@dataclass(frozen=True)
class Speed(Evaluation):
    """Greedy decoding and prefill of random tokens, in each form in turn, one after the other in the same run.

    Attributes:
        forms: some of "dense", "packed" and "semi-structured"; one that no layer can have on the device gives no rows.
        batches: sequences that are decoded together.
        prefill: tokens of one, or as many as the model was made for.
        cached: tokens before the first decoded one.
        steps: tokens that are decoded in one repetition.
        repeats: repetitions, after one that is not counted; the figures are their medians.
        compiled: a step of decoding goes through torch.compile, which takes a minute or more for each form and batch.
    """

    forms: Sequence[str] = FORMS
    batches: Sequence[int] = (1, 4, 16)
    prefill: int = 2048
    cached: int = 128
    steps: int = 32
    repeats: int = 7
    compiled: bool = False

    def __post_init__(self) -> None:
        if not self.forms or len(set(self.forms)) < len(self.forms):
            raise UserError(f"eval.forms={list(self.forms)} is not allowed: give some of {', '.join(FORMS)}, each once")
        for form in self.forms:
            one_of("eval.forms", form, FORMS)
        if not self.batches or len(set(self.batches)) < len(self.batches):
            raise UserError(f"eval.batches={list(self.batches)} is not allowed: give numbers of sequences, each once")
        for batch in self.batches:
            require("eval.batches", batch, int, 1, 4096)
        for key in ("prefill", "cached", "steps", "repeats"):
            require(f"eval.{key}", getattr(self, key), int, 1, 2**20)
        one_of("eval.compiled", self.compiled, (True, False))

    @torch.no_grad()
    def measure(self, model: BlockModel, texts, tokenizer) -> list[Figure]:
        network, device = model.model, model.device
        context = context_length(network.config) or 2**20
        steps = min(self.steps, max(1, context // 4))
        cached, prompt = min(self.cached, context - steps), min(self.prefill, context)
        figures = []
        with whole_model(model) as resident:
            if not resident:
                raise UserError(
                    "eval=speed measures the model as a whole, and it does not fit on the device: use a larger one"
                )
            tensors = {id(tensor): tensor for tensor in network.parameters()}.values()
            disk = sum(tensor.nbytes if tensor.is_meta else stored_size(tensor) for tensor in tensors)
            dense_disk = sum(tensor.nbytes for tensor in tensors)
            for form in self.forms:
                with resident_as(network, form, device) as became:
                    if form != "dense" and not became.layers:
                        continue
                    about = {"device": _name(device), "layers": len(became.layers), "repeats": self.repeats}
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                        torch.cuda.reset_peak_memory_stats(device)
                    for batch in self.batches:
                        decoder = _decoder(network, device, batch, cached, steps, self.compiled)
                        seconds, how = self._seconds(decoder.run, device, decoder.reset), decoder.how
                        rates = [batch * steps / each for each in seconds]
                        more = {**about, "decoding": how, "cached": cached, "steps": steps}
                        figures.append(_rate(form, f"decode at batch {batch}", rates, more))
                        del decoder
                    ids = _random(network, (1, prompt), device)
                    rates = [prompt / each for each in self._seconds(partial(_forward, network, ids), device)]
                    figures.append(_rate(form, f"prefill of {prompt}", rates, about))
                    sizes = {"resident": nbytes(network), "on disk": dense_disk if form == "dense" else disk}
                    if device.type == "cuda":
                        sizes["peak"] = torch.cuda.max_memory_allocated(device)
                    sizes |= {} if form == "dense" else {"pruned weights over dense": became.bytes / became.dense_bytes}
                    for metric, size in sizes.items():
                        share = metric.startswith("pruned")
                        value, unit = (size, None) if share else (size / _MEBIBYTE, "MiB")
                        figures.append(Figure(form, metric, value, "lower", unit=unit, more=about))
        return figures

    def _seconds(
        self, run: Callable[[], object], device: torch.device, reset: Callable[[], None] = lambda: None
    ) -> list[float]:
        """Of each repetition, by the device's clock on CUDA."""
        found = []
        for _ in range(self.repeats + 1):
            reset()
            if device.type == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize(device)
                start.record()
                run()
                end.record()
                end.synchronize()
                found.append(start.elapsed_time(end) / 1000)
            else:
                begin = time.perf_counter()
                run()
                found.append(time.perf_counter() - begin)
        return found[1:]


def _rate(form: str, metric: str, rates: list[float], more: dict) -> Figure:
    more = {**more, "lowest": min(rates), "highest": max(rates)}
    return Figure(form, metric, median(rates), "higher", unit="tokens/s", more=more)


class _Steps:
    """Greedy decoding step by step, with a cache that grows."""

    how = "a launch per kernel"

    def __init__(self, network: nn.Module, device: torch.device, batch: int, cached: int, steps: int) -> None:
        self._network, self._steps = network, steps
        self._prompt = _random(network, (batch, cached), device)

    def reset(self) -> None:
        """Forget what was decoded."""
        self._cache = DynamicCache(config=self._network.config)
        self._next = _forward(self._network, self._prompt, self._cache)

    def run(self) -> None:
        """All steps."""
        for _ in range(self._steps):
            self._next = _forward(self._network, self._next, self._cache)


class _Graph:
    """Greedy decoding with a static cache, a step being one CUDA graph."""

    def __init__(
        self, network: nn.Module, device: torch.device, batch: int, cached: int, steps: int, compiled: bool = False
    ) -> None:
        self.how = "CUDA graphs, compiled" if compiled else "CUDA graphs"
        self._steps, self._cached = steps, cached
        self._cache = StaticCache(config=network.config, max_cache_len=cached + steps)
        self._next = _forward(network, _random(network, (batch, cached), device), self._cache)
        step = torch.compile(network, dynamic=False) if compiled else network
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.reset()
                _forward(step, self._next, self._cache)
            self.reset()
            stream.synchronize()
            torch.cuda.empty_cache()  # what the prompt has left is of no use to a graph
            self._graph = torch.cuda.CUDAGraph()
            with recorded(self._graph, torch.cuda.graph_pool_handle()):
                self._next.copy_(_forward(step, self._next, self._cache))
        torch.cuda.current_stream(device).wait_stream(stream)

    def reset(self) -> None:
        """Forget what was decoded."""
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self._cached)

    def run(self) -> None:
        """All steps."""
        for _ in range(self._steps):
            self._graph.replay()


def _decoder(
    network: nn.Module, device: torch.device, batch: int, cached: int, steps: int, compiled: bool
) -> _Steps | _Graph:
    if device.type != "cuda":
        return _Steps(network, device, batch, cached, steps)
    try:
        return _Graph(network, device, batch, cached, steps, compiled)
    except (RuntimeError, AttributeError, KeyError, ValueError, TypeError) as error:
        warnings.warn(
            f"decoding is measured without CUDA graphs, which this model refuses ({first_line(error)})", stacklevel=2
        )
        return _Steps(network, device, batch, cached, steps)
    finally:
        torch.compiler.reset()


def _forward(network: nn.Module, ids: Tensor, cache=None) -> Tensor:
    """The most likely next tokens, (batch, 1)."""
    logits = network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1:].argmax(-1)


def _random(network: nn.Module, shape: tuple[int, int], device: torch.device) -> Tensor:
    ids = torch.randint(
        network.get_input_embeddings().num_embeddings, shape, generator=torch.Generator().manual_seed(0)
    )
    return ids.to(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
