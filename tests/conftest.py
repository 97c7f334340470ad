"""Fixtures shared by the tests: tiny models, a text, and the folder of real data where there is one.

Torch and transformers are imported where tests are collected: not in the process of pytest-xdist that runs none.
"""

from __future__ import annotations

import gc
import logging
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # else runs would look for cores that are free


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session) -> None:
    if session.config.pluginmanager.has_plugin("dsession"):
        return
    gc.disable()  # what is imported and collected stays, and would be looked through again and again meanwhile

    import torch

    # Without a GPU the kernels run in Triton's interpreter; this must be set before transformers imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _own_log_handlers():
    """Those that a test's run has set up write to streams that are closed with the test."""
    before = list(logging.root.handlers)
    yield
    logging.root.handlers[:] = before


@pytest.fixture(autouse=True, scope="module")
def _what_is_imported_is_no_garbage():
    """A run looks for networks to free among all objects, most of which are the libraries'."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish(session) -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if item.get_closest_marker("heavy"):
            item.add_marker(pytest.mark.slow)
    # The longest first, so that no process waits for another's at the end.
    items.sort(key=lambda item: (not item.get_closest_marker("heavy"), "whole" not in item.path.parts))


def _tiny(kind: str, steps: int):
    @pytest.fixture(scope="session", name=f"tiny_{kind}")
    def folder(tmp_path_factory) -> Path:
        import tiny_models

        from alps_exp.checkpoints.gguf_files import made_once

        base = tmp_path_factory.getbasetemp()
        base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # which all workers have in common
        return made_once(base / f"tiny_{kind}", lambda scratch: tiny_models.build(kind, scratch, steps=steps))

    return folder


# The trained ones are for tests in which a perplexity must make sense; the others have random weights.
tiny_opt = _tiny("opt", steps=80)
tiny_llama = _tiny("llama", steps=80)
tiny_gpt2 = _tiny("gpt2", steps=0)
tiny_gemma3 = _tiny("gemma3", steps=0)
tiny_qwen3 = _tiny("qwen3", steps=0)
tiny_qwen2_moe = _tiny("qwen2_moe", steps=0)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A text of 200 lines (documents), about 200 kB, in the grammar that the tiny models have learned."""
    import tiny_models

    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("\n".join(tiny_models.documents(200, seed=3)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tiny(tiny_opt, text_file) -> list[str]:
    """The words of a run of a second."""
    from tiny import words_for

    return words_for(tiny_opt, text_file, "nsamples=2", "seqlen=32", "eval=none")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and recorded results, beside the checkout or named by ALPS_EXP_SHARED."""
    beside = Path(__file__).parents[2] / "shared"
    path = Path(os.environ.get("ALPS_EXP_SHARED", beside))
    if not path.is_dir():
        pytest.skip("needs the folder of real data: put it beside the checkout as `shared`, or set ALPS_EXP_SHARED")
    return path
