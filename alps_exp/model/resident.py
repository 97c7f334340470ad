"""Linear layers whose pruned weights stay packed in memory, and multiply from there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
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


class _Frozen(nn.Module):
    """A linear layer without gradients.

    Args:
        linear: what it stands for.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise UserError(
                "packed weights give no gradients: use torch.no_grad(), or load the model with resident=dense"
            )
        return self._product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PackedLinear(_Frozen):
    """Its weight is in gap codes.

    Args:
        linear: its bias and sizes.
        coded: its weight.
    """

    def __init__(self, linear: nn.Linear, coded: GapCodes) -> None:
        super().__init__(linear)
        self.bits = coded.bits
        for name in ("values", "codes", "starts"):
            self.register_buffer(name, getattr(coded, name))

    @property
    def weight(self) -> Tensor:
        return gap_codes.decode(self._coded)

    @property
    def _coded(self) -> GapCodes:
        return GapCodes(self.values, self.codes, self.starts, self.bits, self.in_features)

    def _product(self, x: Tensor) -> Tensor:
        return gap_codes.product(x, self._coded, self.bias)


class RowsLinear(_Frozen):
    """Its weight is in compressed sparse rows with 32-bit columns, which torch multiplies on the CPU.

    Args:
        linear: its bias and sizes.
        weight: its weight, float32 or float64.
    """

    def __init__(self, linear: nn.Linear, weight: Tensor) -> None:
        super().__init__(linear)
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
        if len(x) > _FEW_ROWS and self.rows.values().numel() > _FEW_KEPT * self.rows.numel():
            return nn.functional.linear(x, self.weight, self.bias)
        one = len(x) == 1 and torch.backends.mkl.is_available()  # without MKL, torch has no such product with a vector
        result = torch.mv(self.rows, x[0])[None] if one else (self.rows @ x.T).T
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
    names, before, after = [], 0, 0
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
        names.append(full)
        before, after = before + weight.nbytes, after + nbytes(made) - (0 if made.bias is None else made.bias.nbytes)
        linear.weight.data = linear.weight.data.cpu()
    return Resident(tuple(names), before, after)


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
    made = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(converted, requires_grad=False)
    made.bias = linear.bias
    return made


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
