"""eval=speed: what is measured, in which forms, and what is refused. Whether a figure is high is for benchmarks."""

from types import SimpleNamespace

import pytest
import torch
from tiny import network, tokens

from alps_exp.base.errors import UserError
from alps_exp.checkpoints.packed import pack
from alps_exp.evaluation.speed import Speed, _decoder, _forward, _Steps
from alps_exp.model.blocks import BlockModel

CPU = torch.device("cpu")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need CUDA")
QUICK = Speed(batches=(1, 3), prefill=999, cached=999, steps=2, repeats=2)


def pruned():
    made = network("llama").float().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if "proj" in name:
            parameter[torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.8] = 0
    return made


def test_figures_of_a_pruned_model():
    made = pruned()
    stored = pack(dict(made.named_parameters()))[0]
    figures = QUICK.measure(BlockModel(made, CPU), (), None)
    by_form = {form: {f.metric: f for f in figures if f.subject == form} for form in ("dense", "packed")}
    rates = ["decode at batch 1", "decode at batch 3", "prefill of 64"]  # as many as the model was made for
    assert list(by_form["dense"]) == [*rates, "resident", "on disk"]
    assert list(by_form["packed"]) == [*rates, "resident", "on disk", "pruned weights over dense"]
    for form in by_form.values():
        for metric in rates:
            found = form[metric]
            assert (found.unit, found.better) == ("tokens/s", "higher")
            assert 0 < found.more["lowest"] <= found.value <= found.more["highest"] and found.more["repeats"] == 2
        assert all((form[m].unit, form[m].better) == ("MiB", "lower") for m in ("resident", "on disk"))
    dense = sum(p.nbytes for p in made.parameters())
    assert by_form["dense"]["on disk"].value == dense / 2**20
    assert by_form["packed"]["on disk"].value == pytest.approx(sum(t.nbytes for t in stored.values()) / 2**20)
    assert by_form["packed"]["resident"].value < 0.9 * by_form["dense"]["resident"].value
    assert 0.2 < by_form["packed"]["pruned weights over dense"].value < 0.5


def test_a_model_that_is_not_pruned_has_no_packed_rows():
    figures = Speed(batches=[1], prefill=4, cached=4, steps=1, repeats=1).measure(
        BlockModel(network("llama").float(), CPU), (), None
    )
    assert {figure.subject for figure in figures} == {"dense"}


@torch.no_grad()
def test_steps_decode_greedily():
    made, batch = pruned(), tokens(2)[:, :5]
    steps = _Steps(made, CPU, 2, 5, 3)
    steps._prompt = batch
    steps.reset()
    steps.run()
    expected = made.generate(batch, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(steps._next[:, 0], expected[:, -1])
    assert torch.equal(_forward(made, batch)[:, 0], expected[:, 5])


@on_gpu
@torch.no_grad()
def test_a_recorded_step_decodes_what_steps_do():
    made, device = network("llama").float().cuda(), torch.device("cuda", 0)
    graph = _decoder(made, device, 2, 5, 4, compiled=False)
    graph.reset()
    graph.run()
    steps = _Steps(made, device, 2, 5, 4)
    steps.reset()
    steps.run()
    assert graph.how == "CUDA graphs" and torch.equal(graph._next, steps._next)


@on_gpu
@torch.no_grad()
def test_a_model_that_cannot_be_recorded_is_measured_without_and_leaves_the_device_as_it_was():
    class Asking(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network("llama").float().cuda()
            self.config, self.get_input_embeddings = self.inner.config, self.inner.get_input_embeddings

        def forward(self, **kwargs):
            found = self.inner(**kwargs)
            assert found.logits.sum().item() == found.logits.sum().item()
            return found

    torch.cuda.manual_seed(3)
    expected = torch.rand(9, device="cuda")
    torch.cuda.manual_seed(3)
    with pytest.warns(UserWarning, match="decoding is measured without CUDA graphs, which this model refuses"):
        decoder = _decoder(Asking(), torch.device("cuda", 0), 1, 5, 2, compiled=False)
    assert isinstance(decoder, _Steps) and torch.equal(torch.rand(9, device="cuda"), expected)


def test_what_does_not_fit_as_a_whole_is_refused(monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr("alps_exp.evaluation.speed.whole_model", lambda _: nullcontext(False))
    with pytest.raises(UserError, match="does not fit on the device"):
        QUICK.measure(SimpleNamespace(model=network("llama"), device=CPU), (), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forms": []}, r"eval\.forms=\[\] is not allowed: give some of dense, packed, semi-structured"),
        ({"forms": ["zip"]}, "eval.forms='zip' is not allowed"),
        ({"batches": [1, 1]}, r"eval\.batches=\[1, 1\] is not allowed"),
        ({"batches": [0]}, "eval.batches=0 is not allowed"),
        ({"steps": 0}, "eval.steps=0 is not allowed"),
        ({"compiled": "yes"}, "eval.compiled='yes' is not allowed"),
    ],
    ids=["none", "unknown", "twice", "no sequence", "no step", "no truth"],
)
def test_what_is_not_allowed(options, message):
    with pytest.raises(UserError, match=message):
        Speed(**options)
