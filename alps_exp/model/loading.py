"""Language models from the hub, from a local folder, from a GGUF file, or from a pip package.

A model node has `path` (hub id, folder, or GGUF file), `revision`, `gguf_file` (a file inside `path`), `package` (pip
package that carries the file) and `trust_remote_code`; conf/model/*.yaml has one node per model.
"""

from __future__ import annotations

import copy
import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from unittest import mock

import torch
import transformers.utils

if sys.flags.optimize > 1:  # -OO drops docstrings, and this decorator of all models refuses classes without
    transformers.utils.auto_docstring = lambda obj=None, **_: (lambda decorated: decorated) if obj is None else obj

# Assisted generation and losses of object detection take scikit-learn and scipy, and those two seconds of every start;
# quantised checkpoints take torchao, where it is installed, and that a second more and lines on the terminal. All are
# imported when they are called, see below.
with mock.patch.multiple(
    transformers.utils,
    is_sklearn_available=lambda: False,
    is_scipy_available=lambda: False,
    is_torchao_available=lambda: False,
):
    import transformers.generation.candidate_generator
    import transformers.loss.loss_utils
    import transformers.quantizers.quantizer_torchao

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..base.checks import one_of
from ..base.errors import UserError
from ..base.files import sha256
from ..base.packages import package_folder
from ..checkpoints import hub, packed
from ..checkpoints.bin_files import bin_entries, safetensors_folder
from ..checkpoints.checkpoint import (
    PRECEDENCE,
    Checkpoint,
    Entry,
    check_tensors,
    deciding_files,
    fingerprint,
    first_dtype,
    has_bin,
    has_weights,
    refuse_names,
)
from ..checkpoints.gguf_files import converted_folder
from ..checkpoints.location import ADAPTER, NO_CONFIG, check_there, local_model
from . import tokenization
from .source import StreamedBlocks, open_streamed
from .structure import find_blocks


def _later(module: str, name: str) -> Callable:
    return lambda *args, **kwargs: getattr(importlib.import_module(module), name)(*args, **kwargs)


transformers.generation.candidate_generator.is_sklearn_available = transformers.utils.is_sklearn_available
transformers.generation.candidate_generator.roc_curve = _later("sklearn.metrics", "roc_curve")
for _name, _module in list(sys.modules.items()):
    if _name.startswith("transformers.loss.loss_") and hasattr(_module, "is_scipy_available"):
        _module.is_scipy_available = transformers.utils.is_scipy_available
        _module.linear_sum_assignment = _later("scipy.optimize", "linear_sum_assignment")

_quantizer = transformers.quantizers.quantizer_torchao
_quantizer.is_torchao_available = transformers.utils.is_torchao_available
_quantizer.flatten_tensor_state_dict = _later(
    "torchao.prototype.safetensors.safetensors_support", "flatten_tensor_state_dict"
)

_REMEDY = "give a folder with model=local model.path=DIR"


@dataclass(frozen=True)
class ModelSource:
    """Where `from_pretrained` finds the model: a hub id or a folder, and how to speak of it."""

    path: str
    what: str
    revision: str | None
    trust_remote_code: bool

    def arguments(self) -> dict:
        return {
            "pretrained_model_name_or_path": self.path,
            "revision": self.revision or "main",
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass(frozen=True)
class ModelSettings:
    """What is known of a model without its weights.

    Attributes:
        source: where it is.
        config: of config.json; it is shared, so nobody changes it.
        skeleton: the network without weights (see `skeleton`), shared likewise.
    """

    source: ModelSource
    config: PreTrainedConfig = field(compare=False)
    skeleton: PreTrainedModel = field(compare=False, repr=False)

    @property
    def context(self) -> int | None:
        """See `context_length`."""
        return context_length(self.config)

    @property
    def vocabulary(self) -> int | None:
        """See `tokenization.vocabulary_of`."""
        return tokenization.vocabulary_of(self.config)


def resolve(node: Mapping) -> ModelSettings:
    """What a model node names. That of a local model is the same object until its files change.

    Raises:
        UserError: the model cannot be found or read (see `load_model`), its weights are stored quantised, or it is no
            causal language model.
    """
    source = locate(node)
    folder = Path(source.path)
    return _kept(source, _state(folder)) if folder.is_dir() else _described(source)


@lru_cache(maxsize=4)
def _kept(source: ModelSource, state: str) -> ModelSettings:
    return _described(source)


def _described(source: ModelSource) -> ModelSettings:
    config = _config(source)
    return ModelSettings(source, config, skeleton(config, trust_remote_code=source.trust_remote_code))


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model, which splits texts as its tokenizer.json says.

    A local one is the same object at every call until its files change: copy it before you change it.

    Raises:
        UserError: the model cannot be found, or has no tokenizer that can be read.
    """
    return _tokenizer(source)[0]


def tokenizer_note(source: ModelSource) -> str | None:
    """What was unusual about loading a model's tokenizer, see `tokenization.as_its_file_says`."""
    return _tokenizer(source)[1]


def stamps(source: ModelSource) -> tuple[tuple[str, int, int], ...]:
    """What tells whether the files of a local model have changed within the life of a process; none of another."""
    stats = ((file.name, file.stat()) for file in sorted(Path(source.path).glob("*")) if file.is_file())
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _tokenizer(source: ModelSource) -> tuple[PreTrainedTokenizerBase, str | None]:
    if not Path(source.path).is_dir():
        return _read_tokenizer(source)
    return _kept_tokenizer(source, stamps(source))


@lru_cache(maxsize=4)
def _kept_tokenizer(source: ModelSource, files: tuple) -> tuple[PreTrainedTokenizerBase, str | None]:
    return _read_tokenizer(source)


def _read_tokenizer(source: ModelSource) -> tuple[PreTrainedTokenizerBase, str | None]:
    folder, where = Path(source.path), source.arguments()
    lacks = (
        f"{source.what} has no tokenizer, neither {tokenization.FILE} nor the vocabulary of another kind: copy the "
        f"tokenizer's files of the checkpoint it comes from into it"
    )
    try:
        found = AutoTokenizer.from_pretrained(**where)
        if not folder.is_dir():
            folder = hub.cached_model(source.path, source.revision, _REMEDY)
        if tokenization.vocabulary_missing(type(found), folder):
            raise UserError(lacks)
        return tokenization.as_its_file_says(found, folder, where)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # tokenizers are parsed by several libraries, each with its own errors
        if folder.is_dir() and tokenization.vocabulary_missing(PreTrainedTokenizerFast, folder):
            raise UserError(lacks) from None
        why = _why(source, error, "tokenizer")
        if why.startswith("tokenizer of") and (folder / tokenization.FILE).is_file():
            why += (
                ", or set tokenizer_class in tokenizer_config.json to TokenizersBackend, which goes by tokenizer.json"
            )
        raise UserError(why) from None


def load_model(model: ModelSettings, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model with its weights on the CPU, in eval mode, frozen, with the key-value cache switched off.

    Args:
        model: what `resolve` gives.
        dtype: of the weights; "auto" is the checkpoint's own.

    Raises:
        UserError: no such folder, no config.json in it, weights that are missing, damaged or of other shapes, hub not
            reachable, gated model without a token, unknown architecture, model code of its own, package not installed.
    """
    source = model.source
    check_weights(model, download=True)
    kind, where = AutoModelForCausalLM, source.arguments()
    if packed.is_packed(Path(source.path)):
        # Tensors instead of files: the model's own class takes them, the automatic one wants a path.
        kind = type(model.skeleton)
        where = {"pretrained_model_name_or_path": None, "state_dict": packed.read_folder(Path(source.path))}
    try:
        with _errors_only():
            # Mismatched sizes are let pass here because the report names them, and are refused below.
            loaded, report = kind.from_pretrained(
                **where,
                config=copy.deepcopy(model.config),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except MemoryError:
        raise
    except Exception as error:  # safetensors, torch.load, the hub and transformers raise their own errors
        raise UserError(_why(source, error, "weights")) from None
    # transformers would leave such weights random, with a warning only: every number after that would be wrong.
    for key, problem in (("missing_keys", "lacks the weights"), ("mismatched_keys", "has other shapes for")):
        names = (str(name[0] if isinstance(name, tuple) else name) for name in report.get(key) or ())
        refuse_names(source.what, loaded, problem, names)
    if kind is not AutoModelForCausalLM:
        loaded.generation_config = _generation_config(Path(source.path))
    loaded.own_dtype = _own_dtype(model.config, _downloaded(source))
    return _freeze(loaded)


def load_streamed(
    model: ModelSettings, dtype: torch.dtype | str = "auto", pin: bool = False
) -> tuple[PreTrainedModel, StreamedBlocks]:
    """The model with the weights outside its decoder blocks, and the source from which the blocks are read.

    Args:
        model: what `resolve` gives; a checkpoint on the hub is downloaded, one in `.bin` files converted, once.
        dtype: of the weights; "auto" is the checkpoint's own.
        pin: read blocks into page-locked memory, for a CUDA device.

    Raises:
        UserError: as `load_model`; also a model whose weights cannot be read block by block.
    """
    source = model.source
    if source.trust_remote_code:
        raise UserError(f"{source.what} brings model code of its own, which is not streamed: give stream=false")
    check_weights(model, download=True)
    folder = _downloaded(source)
    if packed.is_packed(folder):
        raise UserError(f"{source.what} holds packed weights, which are not streamed: give stream=false")
    checkpoint = Checkpoint(safetensors_folder(folder))
    own = _own_dtype(model.config, folder)
    network = skeleton(model.config, own if dtype == "auto" else dtype)
    network.own_dtype = own
    network.config.name_or_path = source.path
    network.generation_config = _generation_config(folder)
    return network, open_streamed(network, checkpoint, source.what, pin)


def _generation_config(folder: Path) -> GenerationConfig:
    """As `from_pretrained` has it: of its own file, or of what the model's configuration says about generation."""
    own = (folder / "generation_config.json").is_file()
    instead = {} if own else {"config_file_name": "config.json", "_from_model_config": True}
    with _errors_only():
        return GenerationConfig.from_pretrained(folder, **instead)


def _own_dtype(config: PreTrainedConfig, folder: Path) -> torch.dtype:
    """What dtype="auto" stands for."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else first_dtype(_entries(folder))


def _entries(folder: Path) -> dict[str, Entry]:
    if packed.is_packed(folder):
        return packed.packed_entries(folder)
    return bin_entries(folder) if has_bin(folder) else Checkpoint(folder).entries


def check_weights(model: ModelSettings, download: bool = False) -> list[str]:
    """Look at a checkpoint's files, and at the names, shapes and dtypes of its tensors, without reading its weights.

    Args:
        model: what `resolve` gives.
        download: one on the hub, too, which is downloaded for it.

    Returns:
        In words what of it is left out and may matter; empty as a rule.

    Raises:
        UserError: files are missing, truncated or damaged, or hold other tensors than the configuration asks for.
    """
    if not download and not Path(model.source.path).is_dir():
        return []
    folder = _downloaded(model.source)
    return list(_checked(model, folder, _state(folder)))


@lru_cache(maxsize=16)
def _checked(model: ModelSettings, folder: Path, state: str) -> tuple[str, ...]:
    what = model.source.what
    try:
        _generation_config(folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"generation_config.json of {what} cannot be read ({hub.first_line(error)}): mend it, or delete it"
        ) from None
    entries = _entries(folder)
    prefix, blocks = find_blocks(model.skeleton)
    return tuple(check_tensors(model.skeleton, entries, prefix, len(blocks), what))


def _downloaded(source: ModelSource) -> Path:
    """The folder with the weights, of a model on the hub that in its cache."""
    folder = Path(source.path)
    return folder if folder.is_dir() else hub.checkpoint_folder(source.path, source.revision, PRECEDENCE, _REMEDY)


def _cached(source: ModelSource) -> Path:
    """The folder with what is here of a model: its own, or that in the hub's cache."""
    folder = Path(source.path)
    if not folder.is_dir():
        _config(source)  # puts its file into the cache, whose folders are named by their commits
        folder = hub.cached_model(source.path, source.revision, _REMEDY)
    return folder


def identity(source: ModelSource) -> dict[str, str]:
    """What tells this checkpoint from others: its files that are here (`fingerprint`), and its commit on the hub."""
    folder = _cached(source)
    commit = hub.commit(folder)
    return ({} if commit is None else {"commit": commit}) | fingerprint(folder)


def changed(source: ModelSource) -> str:
    """When a checkpoint's files were last written, as a digest, which tells of changes that `identity` does not see."""
    return _state(_cached(source))


def _state(folder: Path) -> str:
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in deciding_files(folder)]
    return sha256(repr(stats))[:16]


def doubts(model: ModelSettings, network: PreTrainedModel) -> list[str]:
    """In words what of a loaded model's checkpoint was left out or contradicts its configuration; empty as a rule."""
    found = check_weights(model, download=True)
    if is_untied(network):
        found.append(
            f"config.json of {model.source.what} ties the head to the embedding, and the weights hold different "
            "ones: they are left apart, as in transformers"
        )
    return found


def is_untied(network: PreTrainedModel) -> bool:
    """Whether a model has a head of its own although its configuration ties it to the embedding."""
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    tied = getattr(network.config.get_text_config(decoder=True), "tie_word_embeddings", False)
    return bool(tied) and head is not None and head.weight is not embedding.weight


def skeleton(
    config: PreTrainedConfig, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model without weights: parameters on the meta device, buffers (rotary frequencies) real, frozen, eval mode.

    Args:
        config: the model's.
        dtype: of the parameters; transformers' choice by default.
        trust_remote_code: whether model code that comes with the checkpoint may run.

    Raises:
        UserError: the configuration is not one of a causal language model.
    """
    from accelerate import init_empty_weights

    arguments = {} if dtype is None else {"dtype": dtype}
    try:
        with init_empty_weights(include_buffers=False):
            empty = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), trust_remote_code=trust_remote_code, **arguments
            )
    except (ValueError, ImportError, OSError) as error:
        raise UserError(f"{config.model_type} is not a causal language model ({hub.first_line(error)})") from None
    # Each parameter was replaced by a tensor of its own as it was registered, which undid the tying of lm_head.
    empty.tie_weights()
    return _freeze(empty)


def context_length(config: PreTrainedConfig) -> int | None:
    """The longest sequence in tokens that the model was made for; None where its configuration names none."""
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        length = getattr(text, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def _freeze(model: PreTrainedModel) -> PreTrainedModel:
    model.own_use_cache = vars(model.config).get("use_cache")  # for saving
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Keep transformers from printing its table of missing weights: the message below says it in one line."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _config(source: ModelSource) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(**source.arguments())
    except MemoryError:
        raise
    except Exception as error:  # the hub, the JSON reader and model code raise their own errors
        raise UserError(_why(source, error, "config.json")) from None
    parts = [config, *(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)]
    keys = ("quantization_config", "compression_config")
    stored = next((found for part in parts for key in keys if (found := getattr(part, key, None))), None)
    if getattr(config, "transformers_weights", None) is not None:
        raise UserError(
            f"config.json of {source.what} names its weights itself (transformers_weights), which is not read here: "
            "take the key out and call the file model.safetensors"
        )
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, Mapping) else getattr(stored, "quant_method", None)
        if str(getattr(method, "value", method)) == "mxfp4":
            raise UserError(
                f"{source.what} stores its experts quantised (mxfp4), which cannot be pruned; write it dequantised to "
                f"a folder, and give that (model.path=DIR): {_dequantising(source)}"
            )
        raise UserError(
            f"{source.what} stores its weights quantised ({method or 'unknown method'}), which cannot be pruned; "
            f"give the unquantised checkpoint"
        )
    if type(config) not in AutoModelForCausalLM._model_mapping and not source.trust_remote_code:
        raise UserError(
            f"{source.what} is of type {config.model_type!r}, which is no causal language model of transformers; "
            f"give another model"
        )
    return config


def _dequantising(source: ModelSource) -> str:
    """The command that writes a checkpoint in bfloat16 to the folder DIR."""
    code = (
        f"import transformers as t; n = {source.path!r}; t.AutoModelForCausalLM.from_pretrained(n, dtype='bfloat16', "
        "quantization_config=t.Mxfp4Config(dequantize=True)).save_pretrained('DIR'); "
        "t.AutoTokenizer.from_pretrained(n).save_pretrained('DIR')"
    )
    return f'python -c "{code}"'


def locate(model: Mapping) -> ModelSource:
    """Where a model node's files are; local ones are looked at, the hub is asked whether it can be reached.

    Raises:
        UserError: they are not there, or the node contradicts itself.
    """
    name, path = model.get("name"), model.get("path")
    gguf_file, package = model.get("gguf_file"), model.get("package")
    revision, trust = model.get("revision"), model.get("trust_remote_code", False)
    one_of("model.trust_remote_code", trust, (True, False))
    if gguf_file and Path(gguf_file).name != gguf_file:
        raise UserError(f"model.gguf_file={gguf_file} is not allowed: give the name of a file in model.path")
    if package:
        if path:
            raise UserError(
                f"model={name} is the file of package {package} and takes no model.path={path}: "
                f"give model=local model.path={path}"
            )
        folder = package_folder(package, f"model={name}")
        return ModelSource(str(_local(folder, gguf_file, f"package {package}")), f"package {package}", None, trust)
    check_there(model)
    path = str(path)
    local = Path(path).expanduser().absolute()
    if local_model(model):
        if revision:
            raise UserError(f"model.revision={revision} goes with a hub id, and model.path={path} is a local folder")
        return ModelSource(str(_local(local, gguf_file, f"model.path={path}")), f"model.path={path}", None, trust)
    if gguf_file:
        raise UserError(
            f"model.gguf_file={gguf_file} needs a local folder and model.path={path} is none: download the file, "
            f"then give model=local model.path=FILE.gguf"
        )
    offline = hub.offline_only(path, revision, "model", _REMEDY)
    if not offline and hub.holds(path, revision, ADAPTER):
        _refuse_adapter(path, f"model {path!r}", hub.holds(path, revision, "config.json"))
    # Without a network the cached folder is given, not local_files_only: transformers 5.17 forgets that argument when
    # it looks for adapters, and then waits through the retries.
    found = hub.cached_model(path, revision, _REMEDY) if offline else path
    if offline and (found / ADAPTER).is_file():
        _refuse_adapter(found, f"model {path!r}", has_weights(found))
    return ModelSource(str(found), f"model {path!r}", revision, trust)


def _local(path: Path, gguf_file: str | None, what: str) -> Path:
    """The folder to load from: `path` itself, or the converted copy of the GGUF file that it is or holds."""
    if path.is_file() and path.suffix == ".gguf":
        return converted_folder(path)
    if not path.is_dir():
        raise UserError(f"{what} is not a folder; give a folder with config.json and the weights, or a .gguf file")
    if gguf_file:
        if not (path / gguf_file).is_file():
            raise UserError(f"{what} has no file {gguf_file!r}; {_listing(path, '*.gguf')}")
        return converted_folder(path / gguf_file)
    if (path / ADAPTER).is_file():
        _refuse_adapter(path, what, has_weights(path) or packed.is_packed(path))
    if not (path / "config.json").is_file():
        if any(path.glob("*.gguf")):
            raise UserError(f"{what} has no config.json; {_listing(path, '*.gguf')}: choose one with model.gguf_file=")
        raise UserError(f"{what} {NO_CONFIG}")
    return path


def _refuse_adapter(path: str | Path, what: str, beside: bool) -> None:
    """transformers would attach the adapter to the model, also to one that it was merged into."""
    merge = (
        f"python -c \"import peft, transformers as t; p = '{path}'; peft.AutoPeftModelForCausalLM.from_pretrained(p, "
        "dtype='auto').merge_and_unload().save_pretrained('MERGED'); t.AutoTokenizer.from_pretrained(p)"
        ".save_pretrained('MERGED')\""
    )
    if beside:
        raise UserError(
            f"{what} holds an adapter ({ADAPTER}) beside a model: if it is merged into the weights, move its files "
            "away; if not, load the model with it (peft), merge_and_unload() and save_pretrained() into a new folder"
        )
    raise UserError(f"{what} is an adapter without its model ({ADAPTER}); merge them and give that folder: {merge}")


def _listing(folder: Path, pattern: str) -> str:
    names = sorted(file.name for file in folder.glob(pattern))
    return f"its {pattern} files: {', '.join(names[:5])}" if names else f"it has no {pattern} file"


def _why(source: ModelSource, error: Exception, part: str) -> str:
    """One line for a failure of transformers to load `part` of a model."""
    text = str(error)
    if "trust_remote_code" in text and not source.trust_remote_code:
        return (
            f"{source.what} needs model code of its own, which is not run unless you trust it: "
            f"model.trust_remote_code=true, or another model"
        )
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return f"{source.what} is of an architecture that the installed transformers does not know; update it, or " + (
            "check model_type in config.json"
        )
    if not Path(source.path).is_dir():
        return hub.explain(error, source.what, source.revision, _REMEDY)
    return f"{part} of {source.what} cannot be read ({hub.first_line(error)}); copy or download it again"
