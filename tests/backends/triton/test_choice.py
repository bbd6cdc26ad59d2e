"""Which backend runs on a GPU, and that Triton is not needed until it is."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch

import kdkernels as kd
from kdkernels import backends
from kdkernels.console import info
from tests.support import ROOT
from tests.support.cases import NATIVE_DTYPES

pytest.importorskip("triton", reason="Triton is not installed")


class TestBackends:
    @pytest.fixture
    def here(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        def set_up(installed: bool, gpu: bool, interpreter: bool = False) -> None:
            monkeypatch.setattr(backends.triton, "installed", lambda: installed)
            monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
            monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreter else "0")

        return set_up

    @pytest.mark.parametrize(
        ("installed", "gpu", "interpreter", "expected"),
        [
            (True, True, False, "triton"),
            (True, False, True, "triton"),
            (True, False, False, "reference"),
            (False, True, False, "reference"),
            (False, True, True, "reference"),
        ],
    )
    def test_which_one_runs_on_a_gpu(
        self, installed: bool, gpu: bool, interpreter: bool, expected: str, here: Callable[..., None]
    ) -> None:
        here(installed, gpu, interpreter)
        for dtype in NATIVE_DTYPES:
            assert kd.backend("cuda", dtype) == expected
        assert kd.backend("cuda", torch.float64) == "reference"
        assert ("triton" in backends.usable()) == (expected == "triton")
        assert kd.backend("cpu") != "triton"

    def test_one_that_is_not_usable_is_refused_by_name(self, here: Callable[..., None]) -> None:
        here(False, True)
        with pytest.raises(ValueError, match=r"backend 'triton' is not usable here; accepted: .*reference"), backends.use("triton"):
            pass
        with pytest.raises(ValueError, match=r"backend 'cuda' is not usable here"), backends.use("cuda"):
            pass

    @pytest.mark.parametrize(("architecture", "kept"), [("sm_90", "16-bit offsets"), ("sm_80", "float32"), ("sm_100", "float32")])
    def test_info_says_which_rows_and_logits(
        self, architecture: str, kept: str, here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here(True, True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr("kdkernels.backends.triton.blocks.architecture", lambda _: architecture)
        monkeypatch.setattr("kdkernels.backends.dtypes.keeps_sums", lambda _: True)
        assert info.facts()["logits"] == "float32"
        monkeypatch.setenv("KDKERNELS_LOGITS", "offsets")
        assert info.facts()["logits"] == kept
        lines = [line.split("  ")[0] for line in info.text().splitlines()]
        assert {"rows, cuda", "logits, cuda"} <= set(lines)

    def test_what_was_asked_for_ends_with_the_block(self) -> None:
        before, inside = kd.backend(), []

        def fails() -> None:
            inside.extend([kd.backend(), kd.backend("cpu", torch.float64)])
            raise RuntimeError("inside")

        with pytest.raises(RuntimeError, match="inside"), backends.use("triton"):
            fails()
        assert inside == ["triton", "triton"]
        assert kd.backend() == before

    def test_it_needs_no_triton_until_it_is_asked_for(self) -> None:
        script = """
            import sys
            sys.modules["triton"] = None  # import triton: ModuleNotFoundError
            import torch, kdkernels as kd
            x = torch.randn(3, 8, requires_grad=True)
            kd.linear_kd_loss(x, torch.randn(9, 8), torch.randn(3, 4), torch.randn(9, 4), strategy="vocab").backward()
            assert not any(name.startswith("kdkernels.backends.triton.") for name in sys.modules)
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
