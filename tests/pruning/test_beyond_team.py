"""Two processes under the stream target, the backward pass and generated text, against one.

The methods choose by scores that rounding hardly moves; SparseGPT and ALPS go on from one changed choice to others.
"""

from __future__ import annotations

import pytest
import torch
from helpers import Forked, Served
from tiny import execute, weights

from alps_exp.runs import together

pytestmark = pytest.mark.slow  # starts processes


@pytest.mark.parametrize(
    "more",
    [
        ["method=magnitude", "refit=exact", "sensitivity=outputs", "sensitivity.windows=3", "allocation=sensitivity"],
        ["method=wanda", "refit=exact", "allocation=spectral", "data=generated", "stream=false"],
    ],
    ids=["sensitivity", "generated"],
)
def test_the_stream_target_is_that_of_one_process(tiny_llama, text_file, tmp_path, monkeypatch, more):
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "assets"))  # for the processes
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    text = [] if "data=generated" in more else ["data=local", f"data.path='{text_file}'"]
    words = ["model=local", f"model.path='{tiny_llama}'", *text, "nsamples=5", "seqlen=64", "eval=none", "device=cpu"]
    words += ["target=stream", "data.holdout=2", "save=true", "sparsity=0.6", *more]
    backwards = any(word.startswith("sensitivity") for word in more)
    monkeypatch.setattr(together, "_start", Served if backwards else Forked)
    one = execute(words, tmp_path / "one")
    two = execute(words, tmp_path / "two", "devices=2")
    assert (two["status"], two["attempts"]) == ("complete", 1)
    assert one["calibration"] == two["calibration"]
    for row, other in zip(one["layers"], two["layers"], strict=True):
        assert [row[key] for key in ("name", "tokens", "target")] == [
            other[key] for key in ("name", "tokens", "target")
        ]
        assert other["sparsity_target"] == row["sparsity_target"]
        for key in ("relative_loss", "held_out_loss", "target_loss"):
            assert (row[key] is None) == (other[key] is None)
            assert row[key] is None or other[key] == pytest.approx(row[key], rel=1e-3), (row["name"], key)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert float(((weight == 0) == (second[name] == 0)).double().mean()) > 0.999, name
        assert float((weight - second[name]).norm() / weight.norm()) < 1e-2, name
    assert len(one["drift"]) == len(two["drift"]) == 2
    for block, other in zip(one["drift"], two["drift"], strict=True):
        for stream, values in block.items():
            for key, value in values.items():
                assert other[stream][key] == pytest.approx(value, rel=1e-3, abs=1e-9), (stream, key)
    assert any(not torch.equal(first[name], second[name]) for name in first)  # the sums do have another order
