"""What the runs of a sweep share is handed out as it was."""

import torch

from alps_exp.cli.overrides import compose
from alps_exp.model import loading
from alps_exp.runs.settings import resolve
from alps_exp.runs.workspace import Workspace


def held(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    blocks = network.transformer.h
    return {**dict(blocks.named_parameters()), **dict(blocks.named_buffers())}


def test_a_kept_network_is_restored_with_all_that_its_blocks_hold(tiny_gpt2, monkeypatch):
    """Also biases, norms and buffers, which some methods may change one day."""
    words = ["model=local", f"model.path={tiny_gpt2}", "data=local", "eval=none", "method=dense", "device=cpu"]
    settings, workspace = resolve(compose(words)), Workspace(keep=True)
    load_model = loading.load_model

    def with_a_buffer(*arguments):
        network = load_model(*arguments)
        network.transformer.h[0].register_buffer("scale", torch.ones(3), persistent=False)
        return network

    monkeypatch.setattr(loading, "load_model", with_a_buffer)
    network = workspace.network(settings)
    before = {name: tensor.clone() for name, tensor in held(network).items()}
    for tensor in held(network).values():
        tensor.data.fill_(7)
    assert workspace.network(settings) is network
    after = held(network)
    assert {name.rpartition(".")[2] for name in before} == {"weight", "bias", "scale"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_kept_network_is_compared_with_its_blocks_once(tiny_llama, tmp_path):
    words = ["model=local", f"model.path={tiny_llama}", "data=local", "eval=none", "method=dense", "device=cpu"]
    settings, workspace = resolve(compose([*words, "stream=false"])), Workspace(keep=True)
    models = [workspace.model(settings, settings.device, tmp_path) for _ in range(2)]
    assert models[0] is not models[1] and models[0].known is models[1].known
    alone = [Workspace().model(settings, settings.device, tmp_path).known for _ in range(2)]
    assert alone[0] is not alone[1]
