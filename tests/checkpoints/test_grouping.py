"""Structured weights are stored as their groups: the layout that fits, its size, the same bits again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from alps_exp.base.errors import UserError
from alps_exp.checkpoints import packed
from alps_exp.patterns import parse_sparsity


def pruned(shape: tuple[int, ...], text: str, dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = weight.where(weight != 0, torch.ones(()))
    return (weight * parse_sparsity(text).keep(weight.abs())).add(0.0).to(dtype)


# Bytes of a group's mask, and of what is stored inside, in bits an entry of the groups that are kept.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("text", "shape", "expected", "stated"),
    [
        ("block=16@0.7", (64, 96), {"scheme": "blocks", "inner": "dense", "rows": 16, "columns": 16}, 24 / 8),
        ("block=12x24@0.5", (48, 96), {"scheme": "blocks", "inner": "dense", "rows": 12, "columns": 24}, 16 / 8),
        ("block=2x8@0.9", (48, 96), {"scheme": "blocks", "inner": "dense", "rows": 2, "columns": 8}, 36),
        ("row@0.3", (40, 24), {"scheme": "blocks", "inner": "dense", "rows": 1, "columns": 24}, 40 / 8),
        ("column@0.5", (40, 25), {"scheme": "blocks", "inner": "dense", "rows": 40, "columns": 1}, 4),
        ("4:8>2:4", (8, 64), {"scheme": "blocks", "inner": "2:4", "rows": 1, "columns": 4}, 16 + 32),
        ("1:2>5:8", (8, 64), {"scheme": "blocks", "inner": "bitmask", "rows": 1, "columns": 8}, 8 + 32),
        ("64:2:8", (128, 64), {"scheme": "shared", "inner": "2:4", "rows": 64, "columns": 8}, 2 * 16 + 512),
        ("16:1:12", (32, 48), {"scheme": "shared", "inner": "bitmask", "rows": 16, "columns": 12}, 2 * 8 + 64),
        ("2:4T", (16, 32), {"scheme": "2:4"}, 64),
    ],
)
def test_a_pattern_is_stored_as_its_groups(text, shape, expected, stated, dtype):
    weight = pruned(shape, text, dtype)
    stored, entries = packed.pack({"w": weight})
    name = str(dtype).removeprefix("torch.")
    assert entries["w"] == {"shape": list(shape), "dtype": name} | expected
    assert sum(part.nbytes for part in stored.values()) == int(weight.count_nonzero()) * weight.itemsize + stated
    again = packed.unpack(stored, entries)["w"]
    assert torch.equal(again, weight) and again.dtype == dtype
    for tensor in (weight, weight.repeat(300 // shape[0], 1)):  # more outputs than are looked at first
        assert packed.stored_size(tensor) == sum(part.nbytes for part in packed.pack({"w": tensor})[0].values())


def test_what_lies_in_kept_groups_comes_back_bit_for_bit():
    weight = pruned((64, 96), "block=16@0.7", torch.float32)
    rows, columns = weight.nonzero()[0].tolist()
    weight[rows : rows + 1, columns : columns + 5] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45])
    stacked = torch.stack([weight, weight.flip(0)])  # as experts' weights are
    for tensor in (weight, weight.T.contiguous(), stacked):
        stored, entries = packed.pack({"w": tensor})
        assert entries["w"]["scheme"] == "blocks" and entries["w"]["inner"] == "dense"
        assert torch.equal(packed.unpack(stored, entries)["w"].view(torch.int32), tensor.view(torch.int32))


def test_random_masks_come_back_whatever_layout_is_taken():
    """Masks with few rows, empty tiles, groups that are not full: many layouts, always the same bits."""
    found, random = set(), np.random.default_rng(0)
    for number in range(150):
        rows, columns = (int(random.choice([1, 2, 4, 8, 16])) for _ in range(2))
        coarse = random.random((int(random.integers(1, 9)), int(random.integers(1, 9)))) < random.choice([0.2, 0.5])
        mask = np.kron(coarse, np.ones((rows, columns), bool)) & (random.random(()) < 0.5)
        mask = mask & (random.random(mask.shape) < random.choice([0.3, 0.9, 1.0]))
        weight = torch.from_numpy(mask * random.normal(size=mask.shape)).to([torch.float32, torch.bfloat16][number % 2])
        stored, entries = packed.pack({"w": weight})
        assert torch.equal(packed.unpack(stored, entries)["w"], weight)
        assert sum(part.nbytes for part in stored.values()) <= weight.nbytes + 1
        found |= {(entry["scheme"], entry.get("inner")) for entry in entries.values()}
    assert {("blocks", "dense"), ("bitmask", None)} <= found


@pytest.mark.parametrize("text", ["0.7", "0.9", "4:8", "2:8"])
def test_what_has_no_groups_stays_a_bitmask(text):
    _, entries = packed.pack({"w": pruned((32, 64), text, torch.bfloat16)})
    assert entries["w"]["scheme"] == "bitmask"


@pytest.mark.parametrize("text", ["block=16@0.7", "64:2:8"])
def test_damage_is_named(text):
    stored, entries = packed.pack({"w": pruned((64, 96), text, torch.float32)})

    def refused(parts: dict, **fields) -> None:
        with pytest.raises(UserError, match="w is damaged"):
            packed.unpack(parts, {"w": entries["w"] | fields})

    refused(stored | {"w.groups": stored["w.groups"][:-1]})
    refused(stored | {"w.groups": stored["w.groups"] ^ 1})
    refused({name: part for name, part in stored.items() if name != "w.groups"})
    refused(stored | {"w.values": stored["w.values"][1:]})
    refused(stored, rows=5)
    refused(stored, columns=0)
    refused(stored, inner="3:4")


def test_a_folder_without_groups_is_read_by_earlier_versions(tmp_path):
    from safetensors.torch import save_file

    for text, version in {"0.7": 1, "block=16@0.7": 2}.items():
        folder = tmp_path / text
        folder.mkdir()
        weight = pruned((32, 64), text, torch.float32)
        save_file({"w": weight, "norm": torch.ones(4)}, folder / "model.safetensors", metadata={"format": "pt"})
        packed.pack_folder(folder)
        assert json.loads((folder / "packed.json").read_text())["version"] == version
        assert torch.equal(packed.read_folder(folder)["w"], weight)
        assert packed.packed_entries(folder)["w"].shape == (32, 64)
        assert torch.equal(packed.read_tensor(folder, "w"), weight)
