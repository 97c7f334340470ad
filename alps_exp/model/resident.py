"""Linear layers whose pruned weights stay packed in memory, and multiply from there."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..base.checks import one_of
from ..base.errors import UserError
from ..numerics import gap_codes
from ..numerics.gap_codes import GapCodes

# On a CPU, more rows of activations at once are faster through a dense copy, unless less than this share is kept.
_FEW_ROWS, _FEW_KEPT = 64, 0.2
FORMS = ("dense", "packed", "semi-structured")
# Layers of one module, by name, that transformers' decoders call with the same input.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# So many times in a row may results that were made together not be fetched; then each layer goes by itself.
_UNREAD = 3


class _Frozen(nn.Module):
    """A linear layer without gradients.

    Args:
        linear: what it stands for.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise UserError(
                "packed weights give no gradients: use torch.no_grad(), or load the model with resident=dense"
            )
        return self._product(x).view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        """(n, out_features) of inputs (…, in_features), n in all."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Matrices(nn.Module):
    """Matrices in gap codes, one below the other, that multiply the same input: one product for all of them.

    The first that is asked for makes the results of all; the others' wait until they are fetched with the same tensor,
    unchanged. Where they are not, again and again (a layer is left out, or has another input), each is multiplied by
    itself from then on.

    Args:
        parts: of equal width, bits and dtype.
        biases: of each; none of them None, or all.
    """

    def __init__(self, parts: Sequence[GapCodes], biases: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.sizes = [part.shape[0] for part in parts]
        stacked = parts[0] if len(parts) == 1 else gap_codes.stack(parts)
        for name in ("values", "codes", "starts"):
            self.register_buffer(name, getattr(stacked, name))
        self.register_buffer("bias", None if biases[0] is None else torch.cat([bias.detach() for bias in biases]))
        self.bits, self.cols = stacked.bits, stacked.cols
        self._waiting: tuple | None = None  # a weak reference to the input, its version, results by place
        self._unread = 0

    def coded(self, place: int | None = None) -> GapCodes:
        """One matrix, or all of them."""
        stacked = GapCodes(self.values, self.codes, self.starts, self.bits, self.cols)
        return stacked if place is None else stacked.between(*self._rows(place))

    def bias_of(self, place: int) -> Tensor | None:
        """The bias of one matrix."""
        return None if self.bias is None else self.bias[slice(*self._rows(place))]

    def product(self, x: Tensor, place: int) -> Tensor:
        """x Wᵀ + bias of one matrix, (n, rows); a view of a wider tensor where there are several.

        Args:
            x: (…, cols), n in all.
            place: of the matrix.
        """
        flat = x.reshape(-1, self.cols)
        if len(self.sizes) == 1:
            return gap_codes.product(flat, self.coded(), self.bias)
        if self._unread >= _UNREAD:
            self._waiting = None
            return gap_codes.product(flat, self.coded(place), self.bias_of(place))
        tracing = torch.compiler.is_compiling()  # a trace knows no versions: the same tensor is taken as unchanged
        if not tracing and x.is_inference():  # such a tensor does not tell whether it was changed
            return gap_codes.product(flat, self.coded(place), self.bias_of(place))
        version = 0 if tracing else x._version
        source, known, results = self._waiting or (None, 0, {})
        if not tracing and isinstance(source, weakref.ref):
            source = source()
        if source is not x or known != version or place not in results:
            self._unread += bool(results)
            results = dict(enumerate(gap_codes.products(flat, self.coded(), self.sizes, self.bias)))
            self._waiting = x if tracing else weakref.ref(x), version, results
        result = results.pop(place)
        if not results:
            self._waiting, self._unread = None, 0
        return result

    def _rows(self, place: int) -> tuple[int, int]:
        begin = sum(self.sizes[:place])
        return begin, begin + self.sizes[place]

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_waiting": None}  # weak references are not copied


class PackedLinear(_Frozen):
    """Its weight is in gap codes.

    Args:
        linear: its bias and sizes.
        coded: its weight.
    """

    def __init__(self, linear: nn.Linear, coded: GapCodes) -> None:
        super().__init__(linear)
        self.matrices, self.place = Matrices([coded], [linear.bias]), 0

    @property
    def weight(self) -> Tensor:
        return gap_codes.decode(self.matrices.coded(self.place))

    @property
    def bias(self) -> Tensor | None:
        """As in torch's layer."""
        return self.matrices.bias_of(self.place)

    def _product(self, x: Tensor) -> Tensor:
        return self.matrices.product(x, self.place)

    @staticmethod
    def join(layers: Sequence[PackedLinear]) -> None:
        """Let layers that read the same input, with codes of the same bits, make one product of it."""
        joint = Matrices([each.matrices.coded(each.place) for each in layers], [each.bias for each in layers])
        for place, layer in enumerate(layers):
            layer.matrices, layer.place = joint, place


class RowsLinear(_Frozen):
    """Its weight is in compressed sparse rows with 32-bit columns, which torch multiplies on the CPU.

    Args:
        linear: its bias and sizes.
        weight: its weight, float32 or float64.
    """

    def __init__(self, linear: nn.Linear, weight: Tensor) -> None:
        super().__init__(linear)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        with warnings.catch_warnings():  # torch calls its sparse rows a beta
            warnings.simplefilter("ignore")
            wide = weight.to_sparse_csr()
            parts = (wide.crow_indices().int(), wide.col_indices().int(), wide.values())
            rows = torch.sparse_csr_tensor(*parts, size=weight.shape, check_invariants=True)
        self.register_buffer("rows", rows, persistent=False)

    @property
    def weight(self) -> Tensor:
        return self.rows.to_dense()

    def _product(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, self.in_features)
        if len(x) > _FEW_ROWS and self.rows.values().numel() > _FEW_KEPT * self.rows.numel():
            return nn.functional.linear(x, self.weight, self.bias)
        one = len(x) == 1 and torch.backends.mkl.is_available()  # without MKL, torch has no such product with a vector
        result = torch.mv(self.rows, x[0])[None] if one else (self.rows @ x.T).T
        return result if self.bias is None else result + self.bias


class SemiStructuredLinear(_Frozen):
    """Its weight is one of torch's semi-structured tensors, which multiply matrices only.

    Args:
        linear: its bias and sizes.
        converted: its weight.
    """

    def __init__(self, linear: nn.Linear, converted: Tensor) -> None:
        super().__init__(linear)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.converted = nn.Parameter(converted, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        return self.converted.to_dense()

    def _product(self, x: Tensor) -> Tensor:
        result = nn.functional.linear(x.reshape(-1, self.in_features), self.converted)
        return result if self.bias is None else result + self.bias


@dataclass(frozen=True)
class Resident:
    """What a model's weights became.

    Attributes:
        layers: names of the linear layers that are in the form now.
        dense_bytes: of their dense weights.
        bytes: of their weights as they are now.
    """

    layers: tuple[str, ...]
    dense_bytes: int
    bytes: int


def make_resident(network: nn.Module, form: str, device: torch.device) -> Resident:
    """Bring a model to a device with its pruned linear layers in a form that takes less space there.

    Layers that would not get smaller (not pruned, or of a shape or dtype that the form lacks) stay dense, and so does
    what is no linear layer: embeddings, norms, experts that are bare parameters.

    Args:
        network: in evaluation mode; changed in place.
        form: "packed": gap codes on CUDA (bfloat16, float16, float32), compressed sparse rows on the CPU (float32,
            float64); "semi-structured": torch's tensors for 2:4 weights (CUDA, bfloat16 and float16); "dense".
        device: where to.

    Raises:
        UserError: an unknown form, or one that no layer of this model can have on this device.
    """
    one_of("resident", form, FORMS)
    report = _swap(network, form, device, [])
    if form != "dense" and not report.layers:
        raise UserError(
            f"resident={form} makes no layer of this model smaller on {device.type}: it wants "
            + ("2:4 weights in bfloat16 or float16 on CUDA" if form == "semi-structured" else "pruned linear layers")
            + "; use resident=dense"
        )
    network.to(device)
    return report


@contextmanager
def resident_as(network: nn.Module, form: str, device: torch.device) -> Iterator[Resident]:
    """A model that lies on the device, in a form for the length of the context; its dense weights rest on the host.

    Yields:
        What the weights became; without layers where none can have the form.
    """
    undo: list[tuple[nn.Module, str, nn.Linear]] = []
    try:
        yield _swap(network, form, device, undo)
    finally:
        for parent, name, linear in undo:
            linear.weight.data = linear.weight.data.to(device)
            setattr(parent, name, linear)


def _swap(network: nn.Module, form: str, device: torch.device, undo: list) -> Resident:
    """Replace the layers that can have the form; what they were is added to `undo`."""
    found, before = {}, 0
    for full, linear in list(network.named_modules()) if form != "dense" else ():
        if type(linear) is not nn.Linear or linear.weight.ndim != 2:
            continue
        weight = linear.weight.detach().to(device)
        made = (_packed if form == "packed" else _semi_structured)(linear, weight)
        if made is None:
            continue
        parent, _, name = full.rpartition(".")
        owner = network.get_submodule(parent)
        undo.append((owner, name, linear))
        setattr(owner, name, made.to(device))
        found[full] = made
        before += weight.nbytes
        linear.weight.data = linear.weight.data.cpu()
    _join(found)
    after = nbytes(nn.ModuleList(found.values())) - sum(
        made.bias.nbytes for made in found.values() if made.bias is not None
    )
    return Resident(tuple(found), before, after)


def _join(layers: dict[str, nn.Module]) -> None:
    """Layers in gap codes that read the same input make one product where their codes have the same bits."""
    for parent in dict.fromkeys(full.rpartition(".")[0] for full in layers):
        for names in _TOGETHER:
            alike: dict[tuple, list[PackedLinear]] = {}
            for each in (layers.get(f"{parent}.{name}") for name in names):
                if isinstance(each, PackedLinear):
                    key = each.matrices.bits, each.in_features, each.matrices.values.dtype, each.bias is None
                    alike.setdefault(key, []).append(each)
            for group in alike.values():
                if len(group) > 1:
                    PackedLinear.join(group)


def _packed(linear: nn.Linear, weight: Tensor) -> nn.Module | None:
    # Counted first: a layer that is not pruned need not be encoded to see that it does not pay.
    kept = int(torch.count_nonzero(weight))
    if weight.device.type == "cpu":
        wide = weight.dtype in (torch.float32, torch.float64)
        return RowsLinear(linear, weight) if wide and kept * (weight.itemsize + 4) < 0.99 * weight.nbytes else None
    fits = weight.dtype in gap_codes.KINDS and weight.shape[1] % gap_codes.GROUP == 0
    if not fits or kept * (weight.itemsize + min(gap_codes.BITS) / 8) >= weight.nbytes:
        return None
    coded = gap_codes.encode(weight)
    return PackedLinear(linear, coded) if coded.nbytes < weight.nbytes else None


def _semi_structured(linear: nn.Linear, weight: Tensor) -> nn.Module | None:
    if weight.device.type != "cuda" or weight.dtype not in (torch.bfloat16, torch.float16) or weight.shape[1] % 4:
        return None
    if int((weight != 0).view(-1, 4).sum(1).max()) > 2:
        return None
    try:
        converted = torch.sparse.to_sparse_semi_structured(weight)
    except (RuntimeError, ValueError):  # a shape or a card that it does not take
        return None
    return SemiStructuredLinear(linear, converted)


def nbytes(network: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return sum(_nbytes(tensor) for tensor in tensors.values())


def _nbytes(tensor: Tensor) -> int:
    if tensor.layout == torch.sparse_csr:
        return sum(part.nbytes for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()))
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(_nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
