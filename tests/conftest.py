"""What holds for every test: one thread, a clean compiler cache, and repeatable property tests."""

from __future__ import annotations

import gc
import os

# Triton reads it when a kernel is defined; without it no kernel runs where there is no GPU.
os.environ["TRITON_INTERPRET"] = "1"
# Else each name of a model or of data that is not there is asked for on the network, several times.
os.environ["HF_HUB_OFFLINE"] = "1"
# Problems here are too small for two threads; the tests that are about threads ask for them. Read when torch is imported, here and
# in the processes that tests start: several of them, each with a thread for every processor, would mostly wait.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator
from contextlib import ExitStack

import hypothesis
import pytest
import torch

from kdkernels.backends import dtypes

torch.set_num_threads(1)  # should a plugin have imported it before
hypothesis.settings.register_profile("repeatable", derandomize=True, max_examples=30, deadline=None, database=None)
hypothesis.settings.register_profile("explore", max_examples=500, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-cases", type=int, default=10_000, help="random calls of tests/fuzz/test_fuzz.py (default 10000)")


def pytest_collection_finish() -> None:
    """What is imported by now stays. The Trainer collects garbage after each run, and would go through all of it."""
    gc.freeze()


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A test that asks for more threads leaves as many as there were."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["widened", "fast", "gpu"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A CPU that widens 16-bit products to float32, one that does them itself, and a GPU, which keeps their results in float32."""

    with ExitStack() as stack:
        if request.param == "gpu":
            from tests.support.interpreter import as_on_a_gpu  # Triton may not be installed

            stack.enter_context(as_on_a_gpu("reference"))
        else:
            monkeypatch.setattr(dtypes, "cpu_multiplies", lambda _: request.param == "fast")
        yield str(request.param)
