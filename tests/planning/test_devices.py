"""The devices that a plan knows: their figures, names and units, and the processor of this machine, which is measured."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import kdkernels as kd
from kdkernels.cli import main
from kdkernels.planning import devices
from kdkernels.planning.devices import DEVICES, NOMINAL_CPU, device
from kdkernels.planning.roofline import Pass, eager_passes, seconds, tokens_passes, vocab_passes
from tests.planning.test_roofline import H100, SIZES
from tests.support import ROOT


class TestDevices:
    def test_an_unknown_one_is_an_error_that_names_the_known(self) -> None:
        with pytest.raises(ValueError, match=r"'H300'.*accepted: A100-40, A100-80, H100, .*, L40S, .*, RTX5090, .*, MI300X, cpu"):
            device("H300")

    @pytest.mark.parametrize(
        ("given", "near"),
        [("h10", "are H100, H100-PCIe"), ("RTX-4090", "is RTX4090"), ("a100", "are A100-40, A100-80"), ("Gaudi", "")],
    )
    def test_the_error_ends_with_the_names_that_are_near(self, given: str, near: str) -> None:
        for refused in (lambda: device(given), lambda: kd.plan(8, 100, 4, 4, device=given)):
            with pytest.raises(ValueError, match=f"'{given}'") as raised:
                refused()
            assert str(raised.value).partition("; the nearest ")[2] == near

    def test_an_unknown_dtype_is_an_error_that_names_the_known(self) -> None:
        with pytest.raises(ValueError, match=r"float64; accepted on H100: torch\.float32, torch\.bfloat16, torch\.float16"):
            seconds([Pass(1.0, 0.0, torch.float64)], H100)

    def test_an_unknown_divergence_is_an_error_that_names_the_known(self) -> None:
        for passes in (eager_passes, tokens_passes, vocab_passes):
            with pytest.raises(ValueError, match=r"'kl'.*forward_kl"):
                passes(*SIZES, torch.float32, divergence="kl")

    @pytest.mark.parametrize("name", DEVICES)
    def test_figures_have_the_units_that_they_say(self, name: str) -> None:
        one = device(name.lower())
        assert one.name == name
        assert 3e11 <= one.bandwidth <= 1e13
        assert 1e13 <= one.rate(torch.float32) < one.rate(torch.bfloat16) == one.rate(torch.float16) <= 5e15
        assert 20e9 <= one.memory <= 3e11
        assert 6e6 <= one.cache <= 3e8
        assert 1e-6 <= one.overhead <= 1e-5
        # a lane multiplies and adds in one instruction; on an A100 half of them do, on an MI300X each does two
        lanes = {"A100-40": 0.5, "A100-80": 0.5, "MI300X": 2.0}.get(name, 1.0)
        assert one.issue == pytest.approx(one.rate(torch.float32) / 2 / lanes, rel=0.02)

    @pytest.mark.parametrize(
        ("called", "known"),
        [
            ("NVIDIA A100-SXM4-40GB", "A100-40"),
            ("NVIDIA A100-PCIE-40GB", "A100-40"),
            ("NVIDIA A100-SXM4-80GB", "A100-80"),
            ("NVIDIA H100 80GB HBM3", "H100"),
            ("NVIDIA H100 PCIe", "H100-PCIe"),
            ("NVIDIA L4", "L4"),
            ("NVIDIA L40", None),
            ("NVIDIA L40S", "L40S"),
            ("NVIDIA GeForce RTX 3090", "RTX3090"),
            ("NVIDIA GeForce RTX 5090", "RTX5090"),
            ("NVIDIA GeForce RTX 5090 Laptop GPU", None),
            ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTXPRO6000"),
            ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None),
            ("AMD Instinct MI300X", "MI300X"),
        ],
    )
    def test_a_gpu_of_this_machine_is_known_by_what_torch_calls_it(
        self, monkeypatch: pytest.MonkeyPatch, called: str, known: str | None
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: called)
        devices.this_gpu.cache_clear()
        found = devices.this_gpu(torch.device("cuda"))
        devices.this_gpu.cache_clear()
        assert (found and found.name) == known

    def test_the_datasheets_of_what_people_rent_most(self) -> None:
        """TB/s, Tflop/s in bfloat16 with sums in float32, GB."""
        for name, figures in {"L40S": (0.864, 362.05, 48), "RTX5090": (1.792, 209.5, 32), "A100-40": (1.555, 312, 40)}.items():
            one = DEVICES[name]
            assert (one.bandwidth / 1e12, one.rate(torch.bfloat16) / 1e12, one.memory / 1e9) == figures

    def test_the_page_and_the_help_name_all_of_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["plan", "--help"])
        shown = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
        assert f"{', '.join(DEVICES)}, or cpu" in shown
        page = " ".join((ROOT / "docs" / "memory-planning.md").read_text().split())
        assert f"({', '.join(DEVICES)}; `cpu` is this one)" in page

    def test_more_multiprocessors_leave_less_cache_for_a_row(self) -> None:
        """Rows of 16,384 float32 were swept again from the cache of an H100 PCIe, and from the memory of an H100."""
        assert DEVICES["H100-PCIe"].cached_row == 50_000_000 // (114 * 6) > 4 * 16_384
        assert DEVICES["H100"].cached_row == 50_000_000 // (132 * 6) < 4 * 16_384

    def test_this_processor_is_measured_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def took(run: Callable[[], object]) -> float:
            """0.01 s for a copy, and for a chunk 4 ms for its heads and 1 ms a row."""
            run()
            if isinstance(run, functools.partial):
                return 0.01
            return 0.004 + 0.001 * len(inspect.getclosurevars(run).nonlocals["hidden"])

        monkeypatch.setattr(devices, "_best_seconds", took)
        devices.measured_cpu.cache_clear()
        try:
            one = device("cpu")
            assert device("CPU") is one
            head = 16_384 * 512
            assert one.rate(torch.float32) == pytest.approx(8 * head / 0.001)
            assert one.operand_bandwidth[torch.float32] == pytest.approx((3 * 4 + 8) * head / 0.004)
            assert one.bandwidth == pytest.approx(2 * 32 * 2**20 / 0.01)
            assert seconds([Pass(one.rate(torch.float32), 0, launches=0)], one) == pytest.approx(1.0), "nothing is taken off"
        finally:
            devices.measured_cpu.cache_clear()

    def test_a_processor_multiplies_when_the_operands_are_there_and_a_gpu_meanwhile(self) -> None:
        work = Pass(0.25 * NOMINAL_CPU.rate(torch.float32), 0.5 * NOMINAL_CPU.operand_bandwidth[torch.float32], launches=0)
        assert seconds([work], NOMINAL_CPU) == pytest.approx(0.75)
        meanwhile = replace(NOMINAL_CPU, operand_bandwidth={}, bandwidth=NOMINAL_CPU.operand_bandwidth[torch.float32])
        assert seconds([work], meanwhile) == pytest.approx(0.5)
        assert seconds([Pass(0.0, NOMINAL_CPU.bandwidth, launches=0)], NOMINAL_CPU) == pytest.approx(1.0), "as a copy"
        assert not any(gpu.operand_bandwidth for gpu in DEVICES.values())

    def test_this_processor_is_measured(self) -> None:
        one = device("cpu")
        assert one.measured
        assert set(one.rates) == {torch.float32, torch.bfloat16, torch.float16}
        assert 1e7 < one.bandwidth < 1e13
        assert all(1e7 < rate < 1e15 for rate in one.rates.values())
        assert set(one.operand_bandwidth) == set(one.rates)
        assert all(1e7 < rate < 1e13 for rate in one.operand_bandwidth.values())
