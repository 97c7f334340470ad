"""The packed form of pruned weights: bit for bit the dense one, of the size it should be, and refused when damaged."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import words_for
from transformers import AutoModelForCausalLM

import alps_exp
from alps_exp.base.errors import UserError
from alps_exp.checkpoints import packed
from alps_exp.cli.overrides import compose
from alps_exp.patterns import parse_sparsity
from alps_exp.runs import run
from alps_exp.runs.settings import resolve

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def pruned(shape, written: str, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (weight * parse_sparsity(written).keep(weight.abs())).add(0.0).to(dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    kind = INTEGERS.get(one.dtype)
    return torch.equal(one, other) if kind is None else torch.equal(one.contiguous().view(kind), other.view(kind))


def round_trip(tensors: dict) -> dict[str, dict]:
    stored, entries = packed.pack(tensors)
    again = packed.unpack(stored, entries)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(tensor, again[name]), name
    return entries


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize(
    ("shape", "written", "scheme"),
    [
        ((16, 64), "0.7", "bitmask"),
        ((7, 13), "0.5", "bitmask"),
        ((1, 9), "0.9", "bitmask"),
        ((16, 64), "2:4", "2:4"),
        ((3, 12), "2:4", "2:4"),
        ((1, 4), "2:4", "2:4"),
        ((16, 64), "4:8", "bitmask"),
        ((16, 64), "1:4", "bitmask"),
        ((5, 9), "2:3", "bitmask"),
    ],
)
def test_round_trip_and_scheme(shape, written, scheme, dtype):
    weight = pruned(shape, written, dtype)
    assert round_trip({"w": weight})["w"] == {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "scheme": scheme,
    }
    stored, _ = packed.pack({"w": weight})
    size = sum(tensor.nbytes for tensor in stored.values())
    assert size == int(weight.count_nonzero()) * weight.itemsize + math.ceil(weight.numel() / 8)
    assert packed.stored_size(weight) == size and packed.stored_size(torch.ones(shape)) == 4 * weight.numel()
    sparsity = 1 - int(weight.count_nonzero()) / weight.numel()
    assert math.ceil(packed.packed_size(shape, sparsity, weight.itemsize) - 1e-9) == size


@pytest.mark.parametrize("written", ["0.7", "2:4"])
def test_every_bit_pattern_survives(written):
    for dtype, kind in INTEGERS.items():
        weight = pruned((8, 16), written, dtype)
        weight[0, :4] = torch.tensor([0.0, -0.0, float("nan"), 0.0], dtype=dtype)
        weight[1, :4] = torch.tensor([float("inf"), 0.0, 0.0, -float("inf")], dtype=dtype)
        weight[2] = 0
        weight[3, 4:8] = 0  # a kept weight of 2:4 that is itself zero
        weight.view(kind)[4, :4] = torch.tensor([1, 0, 0, 0], dtype=kind)  # the smallest subnormal number
        assert round_trip({"w": weight})["w"]["scheme"] == ("2:4" if written == "2:4" else "bitmask")


def test_all_masks_of_a_byte():
    groups = torch.tensor([[(byte >> bit) & 1 for bit in range(8)] for byte in range(256)], dtype=torch.float32)
    fitting = groups[(groups.view(256, 2, 4).sum(2) <= 2).all(1)]
    padding = torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat(400, 2)  # enough full groups that 2:4 is chosen
    assert round_trip({"w": torch.cat([fitting, padding])})["w"]["scheme"] == "2:4"
    assert round_trip({"w": torch.cat([groups, 0 * groups])})["w"]["scheme"] == "bitmask"


def test_the_stored_layout_is_the_stated_one():
    weight = torch.tensor([[0.0, 2.0, 0.0, 3.0], [4.0, 5.0, 0.0, 0.0], [0.0, 0.0, 6.0, 7.0]])
    stored, _ = packed.pack({"w": weight})
    assert stored["w.values"].tolist() == [2, 3, 4, 5, 6, 7]
    assert stored["w.indices"].tolist() == [0b0100_1101, 0b0100_1110]  # the last group is absent: filled up
    stored, _ = packed.pack({"w": weight[:, :3].clone()})
    assert stored["w.values"].tolist() == [2, 4, 5, 6]
    assert stored["w.mask"].tolist() == [0b0001_1010, 0b1]


def test_what_does_not_get_smaller_is_stored_as_it_is():
    tensors = {
        "dense": torch.randn(8, 8),
        "nearly dense": torch.ones(8, 8).index_fill_(1, torch.tensor([0]), 0.0)[:, :8].clone().half(),
        "vector": torch.zeros(64),
        "integers": torch.zeros(8, 8, dtype=torch.int64),
        "scalar": torch.tensor(0.0),
        "empty": torch.zeros(0, 4),
    }
    stored, entries = packed.pack(tensors)
    assert set(entries) <= {"nearly dense"} and {"dense", "vector", "integers", "scalar", "empty"} <= set(stored)
    round_trip(tensors)
    assert round_trip({"view": pruned((12, 20), "0.5", torch.float32).T})["view"]["shape"] == [20, 12]


@pytest.fixture(scope="module")
def saved(tiny_llama, text_file, tmp_path_factory):
    """A packed run and a dense run of the same configuration: their folders, and the packed one's record."""
    folder = tmp_path_factory.mktemp("saved")
    words = words_for(
        tiny_llama,
        text_file,
        *("nsamples=4", "seqlen=64", "eval.windows=4", "eval.sample_tokens=4", "method=alps", "sparsity=0.7"),
        'layers.sparsity={"q_proj":"2:4"}',
    )
    records = {form: run.run(compose([*words, f"save={form}"]), folder / form) for form in ("packed", "true")}
    return folder / "packed" / "model", folder / "true" / "model", records["packed"], words


def test_a_packed_run_holds_the_weights_of_a_dense_one(saved):
    folder, dense, record, _ = saved
    network, plain = alps_exp.load_packed(folder), AutoModelForCausalLM.from_pretrained(dense)
    assert network.generation_config.to_dict() == plain.generation_config.to_dict()
    expected = plain.state_dict()
    assert network.state_dict().keys() == expected.keys()
    assert all(same_bits(tensor, expected[name]) for name, tensor in network.state_dict().items())
    assert not network.training
    entries = json.loads((folder / "packed.json").read_text())["tensors"]
    assert {name.removesuffix(".weight") for name in entries} == {row["name"] for row in record["layers"]}
    schemes = {name.split(".")[-2]: entry["scheme"] for name, entry in entries.items()}
    assert schemes["q_proj"] == "2:4" and schemes["down_proj"] == "bitmask"
    assert {path.name for path in dense.iterdir()} - {path.name for path in folder.iterdir()} == {"model.safetensors"}


def test_pruned_weights_are_plus_zero(saved):
    # A -0 would be stored as a kept weight.
    _, dense, record, _ = saved
    state = load_file(dense / "model.safetensors")
    for row in record["layers"]:
        weight = state[f"{row['name']}.weight"]
        assert int((weight.view(torch.int32) != 0).sum()) == int(weight.count_nonzero()), row["name"]


def test_sizes_are_those_of_the_files(saved, capsys):
    folder, dense, record, _ = saved
    sizes = record["saved"]
    assert sizes["dense_bytes"] == (dense / "model.safetensors").stat().st_size
    assert sizes["packed_bytes"] == sum(path.stat().st_size for path in folder.glob("packed-*.safetensors"))
    assert sizes["ratio"] == sizes["packed_bytes"] / sizes["dense_bytes"] < 0.7
    assert json.loads((folder / "record.json").read_text())["saved"] == sizes


@pytest.mark.slow
def test_a_packed_folder_is_evaluated_like_any_model(saved, tmp_path):
    folder, _, record, words = saved
    again = run.run(compose([*words[:-3], f"model.path={folder}", "method=dense"]), tmp_path)
    assert again["evaluations"][0]["value"] == pytest.approx(record["evaluations"][0]["value"], rel=1e-6)
    assert again["sample"]["dense"] == record["sample"]["pruned"]


def test_a_plain_load_is_refused_rather_than_made_up(saved):
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(saved[0])


def test_shards_and_tied_weights(tiny_gemma3, tmp_path):
    network = AutoModelForCausalLM.from_pretrained(tiny_gemma3, dtype=torch.bfloat16)
    for name, parameter in network.named_parameters():
        if "mlp" in name:
            parameter.data.copy_(pruned(parameter.shape, "0.6", torch.bfloat16))
    network.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = len(list(tmp_path.glob("model-*.safetensors")))
    assert shards > 2
    packed.pack_folder(tmp_path)
    assert len(list(tmp_path.glob("packed-*.safetensors"))) == shards
    assert not list(tmp_path.glob("model*"))
    again = alps_exp.load_packed(tmp_path)
    assert again.dtype == torch.bfloat16 and again.lm_head.weight is again.get_input_embeddings().weight
    state = again.state_dict()
    assert all(same_bits(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_an_interruption_leaves_the_dense_folder(tiny_llama, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "copy"))
    before = (folder / "model.safetensors").read_bytes()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("alps_exp.checkpoints.packed.write_json", interrupted)
        with pytest.raises(KeyboardInterrupt):
            packed.pack_folder(folder)
    assert not packed.is_packed(folder) and (folder / "model.safetensors").read_bytes() == before
    packed.pack_folder(folder)
    assert packed.is_packed(folder) and alps_exp.load_packed(folder)


def damage(change):
    def apply(folder: Path) -> None:
        content = json.loads((folder / "packed.json").read_text())
        change(content)
        (folder / "packed.json").write_text(json.dumps(content))

    return apply


def entry(content) -> dict:
    return next(iter(content["tensors"].values()))


def edit_tensors(change):
    def apply(folder: Path) -> None:
        (file,) = folder.glob("packed-*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return apply


def flip_a_bit(tensors) -> None:
    mask = next(tensor for name, tensor in tensors.items() if name.endswith(".mask"))
    mask[0] ^= 1


def spoil_an_index(tensors) -> None:
    next(tensor for name, tensor in tensors.items() if name.endswith(".indices"))[0] = 0


def drop(ending: str):
    return lambda tensors: tensors.pop(next(name for name in tensors if name.endswith(ending)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage(lambda content: content.update(version=3)), "version 3"),
        (damage(lambda content: content.pop("files")), r"packed\.json is damaged"),
        (damage(lambda content: content.update(tensors=[])), r"packed\.json is damaged"),
        (lambda folder: (folder / "packed.json").write_text("{"), r"packed\.json is damaged"),
        (damage(lambda content: content.update(files=["../secret.safetensors"])), "no part of a packed model"),
        (damage(lambda content: content.update(files=["/etc/passwd"])), "no part of a packed model"),
        (damage(lambda content: entry(content).update(shape=[1 << 40, 1 << 20])), "other shapes"),
        (damage(lambda content: entry(content).update(shape=[-64, -64])), "other shapes"),
        (damage(lambda content: entry(content).update(dtype="load")), "damaged"),
        (damage(lambda content: entry(content).update(scheme="3:4")), "damaged"),
        (edit_tensors(flip_a_bit), "damaged"),
        (edit_tensors(spoil_an_index), "damaged"),
        (edit_tensors(drop(".mask")), "damaged"),
        (edit_tensors(drop(".values")), "lacks the tensor"),
        (lambda folder: next(folder.glob("packed-*")).unlink(), "missing or damaged"),
        (lambda folder: next(folder.glob("packed-*")).write_bytes(b"x" * 1000), "missing or damaged"),
    ],
)
def test_damage_is_named(saved, tmp_path, spoil, message):
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        alps_exp.load_packed(folder)
    assert "\n" not in str(error.value)


def test_other_folders_are_refused(saved, tmp_path):
    with pytest.raises(UserError, match=r"packed\.json.*from_pretrained"):
        alps_exp.load_packed(saved[1])
    with pytest.raises(UserError, match=r"no model\.safetensors to pack"):
        packed.pack_folder(tmp_path)


def test_a_folder_that_stays_packed_in_memory(saved):
    dense = alps_exp.load_packed(saved[0])
    with pytest.warns(UserWarning, match=r"2 tensors .* dense in memory, model\.layers\.0\.self_attn\.q_proj for one"):
        resident = alps_exp.load_packed(saved[0], resident="packed", device="cpu")  # rows of 2:4 are no smaller there
    ids = torch.arange(3, 15)[None]
    assert torch.allclose(resident(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    assert resident.config.use_cache and not resident.training
    with pytest.raises(UserError, match=r"resident='zip' is not allowed; known: dense, packed, semi-structured"):
        alps_exp.load_packed(saved[0], resident="zip")
    with pytest.raises(UserError, match="resident=semi-structured makes no layer of this model smaller on cpu"):
        alps_exp.load_packed(saved[0], resident="semi-structured", device="cpu")


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], False),
        (["save=true"], True),
        (["save=dense"], "dense"),
        (["save=packed"], "packed"),
        (["save.format=packed"], "packed"),
        (["save=true", "save.format=packed"], "packed"),
        (["save.format=dense", "save=true"], "dense"),
    ],
)
def test_forms_of_save(words, value):
    assert compose(words).save == value


def test_save_is_checked():
    with pytest.raises(UserError, match=r"save=false and save\.format=packed are inconsistent"):
        compose(["save=false", "save.format=packed"])
    with pytest.raises(UserError, match=r"save='zip' is not allowed; known: False, True, dense, packed"):
        resolve(compose(["save.format=zip"]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's semi-structured tensors need CUDA")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_of_four_weights_are_torchs_semi_structured_ones(dtype):
    weight = pruned((256, 512), "2:4", dtype)
    stored, entries = packed.pack({"w": weight})
    assert entries["w"]["scheme"] == "2:4"
    unpacked = packed.unpack(stored, entries)["w"].cuda()
    sparse = torch.sparse.to_sparse_semi_structured(unpacked)
    assert torch.equal(sparse.to_dense(), unpacked)
    inputs = torch.randn(64, 512, device="cuda", dtype=dtype)
    expected = inputs.double() @ unpacked.double().T
    for product in (torch.nn.functional.linear(inputs, sparse), torch.nn.functional.linear(inputs, unpacked)):
        assert float((product.double() - expected).norm() / expected.norm()) < torch.finfo(dtype).eps
