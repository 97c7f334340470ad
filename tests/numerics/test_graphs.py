"""Recordings that fail: their error is told, and nothing of them is left."""

import gc

import pytest
import torch

from alps_exp.numerics import graphs

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need CUDA")


class Stand:
    """In place of a graph."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.ends = fails, 0

    def capture_begin(self, pool, capture_error_mode) -> None:
        assert not gc.isenabled() and capture_error_mode == "thread_local"

    def capture_end(self) -> None:
        self.ends += 1
        if self.fails:
            raise RuntimeError("the capture is invalid")


@pytest.mark.parametrize("fails", [False, True], ids=["a valid capture", "an invalid one"])
@pytest.mark.parametrize("error", [None, ValueError("inside"), RuntimeError("inside")], ids=repr)
def test_an_error_is_told_and_torch_forgets_a_capture_that_failed(monkeypatch, error, fails):
    forgotten, graph = [], Stand(fails)
    monkeypatch.setattr(graphs, "_forget", lambda device, pool: forgotten.append(pool))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def record() -> None:
        with graphs.recorded(graph, (0, 7)):
            if error is not None:
                raise error

    told = str(error or ("the capture is invalid" if fails else ""))
    if told:
        with pytest.raises(type(error or RuntimeError()), match=told):
            record()
    else:
        record()
    assert graph.ends == 1 and forgotten == [(0, 7)] * fails and gc.isenabled()


@pytest.mark.parametrize("over", [False, True], ids=["it was going on", "it was over"])
def test_the_pool_is_given_back_once(monkeypatch, over):
    """A graph whose capture was over gives its pool back itself: a second time would end the process."""
    asked = []

    def end(device, pool) -> None:
        asked.append(("end", device, pool))
        if over:
            raise RuntimeError("not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *what: asked.append(("release", *what)), raising=False)
    graphs._close(1, (0, 7))
    assert asked == [("end", 1, (0, 7)), ("release", 1, (0, 7))][: 1 if over else 2]


@on_gpu
@pytest.mark.parametrize("where", ["asks", "at the end"])
def test_after_a_failed_recording_the_device_works_as_before(where):
    x = torch.ones(1 << 22, device="cuda")
    stream, other = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.manual_seed(3)
    torch.rand(5, device="cuda")
    state = torch.cuda.get_rng_state()
    expected = torch.rand(9, device="cuda")
    torch.cuda.set_rng_state(state)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()

    def failing() -> None:
        with torch.cuda.stream(stream), graphs.recorded(torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()):
            y = x * 2
            if where == "asks":
                y.sum().item()
            else:  # work of another stream that never joins
                other.wait_stream(stream)
                with torch.cuda.stream(other):
                    x * 3

    with pytest.raises(RuntimeError):
        failing()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
    assert torch.equal(torch.rand(9, device="cuda"), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), graphs.recorded(graph, torch.cuda.graph_pool_handle()):
        y = x * 2
    graph.replay()
    torch.cuda.synchronize()
    assert float(y.sum()) == 2 * x.numel()
