"""A backend is one object in a tuple: nothing else knows its name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kdkernels as kd
from kdkernels import backends


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_a_backend_that_is_registered_serves_what_it_says_it_does(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def operators() -> object:
        asked.append(strategy)
        return backends.reference.BACKEND.operators()

    another = replace(backends.reference.BACKEND, name="another", operators=operators, device="cpu", dtypes=(torch.float32,))
    monkeypatch.setattr(backends, "BACKENDS", (another, *backends.BACKENDS))
    assert (kd.backend(), kd.backend("cpu", torch.float64)) == ("another", "reference")
    side = torch.randn(6, 8), torch.randn(37, 8)
    loss = kd.linear_kd_loss(*side, *side, divergence="jsd", strategy=strategy)
    assert asked
    with backends.use("reference"):
        torch.testing.assert_close(loss, kd.linear_kd_loss(*side, *side, divergence="jsd", strategy=strategy), rtol=0, atol=0)


def test_one_that_cannot_run_here_leaves_its_work_to_the_next(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    absent = replace(backends.reference.BACKEND, name="absent", usable=lambda: False, missing="it is not there", get_it="fetch it")
    here = kd.backend()
    monkeypatch.setattr(backends, "BACKENDS", (absent, *backends.BACKENDS))
    backends._say_what_is_missing.cache_clear()
    assert kd.backend() == here
    assert "absent" not in backends.usable()
    kd.kd_loss(torch.randn(6, 37), torch.randn(6, 37))
    (said,) = caplog.messages
    assert "it is not there" in said
    assert "fetch it" in said
