"""compute-sanitizer over every kernel, as far as it can be looked at without one: what is started, and what its output says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_sanitizer
from benchmarks.gpu_device import interpreted
from benchmarks.gpu_sanitizer import LAUNCHES, TOOLS, command, findings
from tests.support.needs import needs_triton

CLEAN = {
    "memcheck": "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n",
    "racecheck": "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
}
INVALID_READ = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at row_loss+0x950
=========     by thread (31,0,0) in block (3,0,0)
=========     Address 0x7f00 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========
========= Invalid __shared__ write of size 4 bytes
=========     at row_loss+0x100
========= ERROR SUMMARY: 2 errors
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at row_loss+0x950 and Read access at row_loss+0xa10 [32 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
READS = ["Invalid __global__ read of size 16 bytes", "Invalid __shared__ write of size 4 bytes"]


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


def installed(folder: Path, output: str, status: int = 0) -> Path:
    """A program of that name which only says something."""
    folder.mkdir(parents=True)
    program = folder / gpu_sanitizer.PROGRAM
    program.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{output}END\nexit {status}\n")
    program.chmod(0o755)
    return program


def test_only_the_librarys_kernels_are_looked_at() -> None:
    for tool in TOOLS:
        words = command("/cuda/bin/compute-sanitizer", tool)
        assert words[:3] == ["/cuda/bin/compute-sanitizer", "--tool", tool]
        assert [word for word in words if word.startswith("kns=")] == [f"kns={kernel}" for kernel in gpu_sanitizer.KERNELS]
        assert words[-3:] == command("", LAUNCHES) == [sys.executable, "-m", "benchmarks.gpu_sanitizer"]


class TestFindings:
    @pytest.mark.parametrize("output", CLEAN.values(), ids=CLEAN)
    def test_none(self, output: str) -> None:
        assert findings(f"before\n{output}") == []

    def test_the_first_line_of_each(self) -> None:
        assert findings(INVALID_READ) == READS
        (race,) = findings(RACE)
        assert race.startswith("Error: Race reported between Write access at row_loss+0x950")

    def test_of_every_process_that_was_looked_at(self) -> None:
        assert findings(CLEAN["memcheck"] + INVALID_READ) == READS

    @pytest.mark.parametrize("output", ["", "========= COMPUTE-SANITIZER\nTraceback\nRuntimeError: out of memory"])
    def test_a_tool_that_did_not_end_says_nothing_about_the_kernels(self, output: str) -> None:
        with pytest.raises(LookupError, match=output.rpartition("\n")[2] or "nothing"):
            findings(output)


class TestStage:
    def result(self, name: str) -> gpu_sanitizer.Result:
        (found,) = gpu_sanitizer.opened("short")(name)
        return found

    def test_is_skipped_where_the_program_is_not_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_sanitizer, "INSTALLED", Path("/nowhere"))
        for name in (LAUNCHES, *TOOLS):
            assert "is neither in PATH nor below CUDA_HOME" in self.result(name)["skipped"]
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert "NVIDIA" in self.result(TOOLS[0])["skipped"]
        (of_the_interpreter,) = gpu_sanitizer.opened("toy")(TOOLS[0])
        assert "NVIDIA" in of_the_interpreter["skipped"]

    @pytest.mark.parametrize(("variable", "below"), [("PATH", ""), ("CUDA_HOME", "bin"), ("CUDA_PATH", "compute-sanitizer")])
    def test_the_program_is_found(self, variable: str, below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program = installed(tmp_path / "cuda" / below, CLEAN["memcheck"])
        monkeypatch.setenv(variable, str(tmp_path / "cuda"))
        assert gpu_sanitizer.program() == str(program)
        assert self.result("memcheck") == {"check": "memcheck", "passed": True}

    def test_findings_and_launches_that_fail_are_failures(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, output, status, reason in (
            ("found", INVALID_READ, 0, "2 findings: Invalid __global__ read of size 16 bytes; Invalid"),
            ("failed", CLEAN["memcheck"], 3, "exit status 3"),
            ("broken", "no driver\n", 1, "no driver"),
        ):
            installed(tmp_path / name, output, status)
            monkeypatch.setenv("PATH", str(tmp_path / name))
            found = self.result("memcheck")
            assert found["passed"] is False
            assert reason in found["reason"]


@needs_triton
def test_the_launches_are_of_every_kernel_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdkernels.backends.triton import offsets, rows, scaling, vocabulary

    monkeypatch.setattr(gpu_sanitizer, "moved", lambda case, device: case)
    monkeypatch.setattr(gpu_sanitizer, "VOCAB", 301)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    started: set[str] = set()
    for module, name in (
        (rows, "row_loss_kernel"),
        *((vocabulary, f"{kernel}_kernel") for kernel in ("statistics", "sums", "gradient")),
        *((offsets, f"offsets_{kernel}_kernel") for kernel in ("product", "row")),
        (scaling, "scale_kernel"),
    ):
        launched = getattr(module, name)

        class Watched:
            def __init__(self, kernel: object, name: str) -> None:
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid: object) -> object:
                started.add(self.name)
                return self.kernel[grid]  # type: ignore[index]

        monkeypatch.setattr(module, name, Watched(launched, name))
    with interpreted():
        gpu_sanitizer.launch()
    assert len(started) == 7
    assert all(any(part in name for part in gpu_sanitizer.KERNELS) for name in started)
