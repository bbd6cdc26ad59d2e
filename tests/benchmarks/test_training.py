"""Whole steps: every loop trains with the same loss and gradients, what is measured is the step alone, and the table shows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div

pytest.importorskip("transformers")
pytest.importorskip("trl")
pytest.importorskip("datasets")

from benchmarks import readme, trainers, training
from benchmarks.cases import GIB, MIB
from benchmarks.rows import RESULTS, line
from benchmarks.trainers import TRAINERS, Run, Watch
from tests.support import ROOT
from tests.support.needs import needs_proc

HEAD, TOKENS = training.TOY.head, training.TOY.tokens[0]
STEPS = 3
TOLERANCE = torch.finfo(torch.float32).eps ** 0.5  # half of the digits of float32
ON_CPUS = [name for name in TRAINERS if "use_liger_kernel" not in name]


def divergence(student: Any, teacher: Any, seed: int, tokens: int = TOKENS) -> torch.Tensor:
    """By the plain formula."""
    ids = training.example(HEAD, tokens, seed)[None]
    q, p = (model(ids).logits[0, :-1].log_softmax(-1) for model in (student, teacher))
    return kl_div(q, p, reduction="batchmean", log_target=True)


def losses(contender: str, folder: Path) -> list[float]:
    """Of a short step and ``STEPS`` others."""
    student, teacher = training.models(HEAD)
    examples = [training.example(HEAD, TOKENS, seed) for seed in range(STEPS + 1)]
    watch = Watch(lambda: 1.0, STEPS, float("inf"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TRAINERS[contender](Run(student, teacher, examples, watch, folder))


@needs_proc
class TestContenders:
    @pytest.fixture(autouse=True)
    def fast_and_silent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A learning rate at which a step shows in the loss of the next one."""
        monkeypatch.setattr(trainers, "LEARNING_RATE", 1e-2)
        monkeypatch.setenv("CI", "1")  # TRL reports each trainer that is made, except where it is told that these are tests

    @pytest.fixture(scope="class")
    @classmethod
    def expected(cls) -> list[float]:
        """In float64, by autograd over the plain formula and torch's AdamW, with a step of learning rate 0 first."""
        student, teacher = (model.double() for model in training.models(HEAD))
        untrained = divergence(training.models(HEAD)[0].double(), teacher, STEPS)
        optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.0)
        found = []
        for seed in range(STEPS + 1):
            loss = divergence(student, teacher, seed)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = 1e-2 if seed else 0.0
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        assert abs(found[-1] - untrained.item()) > 100 * TOLERANCE * found[-1], "what was learned shows"
        return found

    @pytest.mark.parametrize("contender", ON_CPUS)
    def test_a_run_has_the_losses_of_a_float64_run(self, contender: str, expected: list[float], tmp_path: Path) -> None:
        """Each loss after the second shows the gradients before it."""
        assert losses(contender, tmp_path) == pytest.approx(expected, rel=TOLERANCE)


def test_the_float64_losses_are_those_of_each_prefix() -> None:
    student, teacher = (model.double() for model in training.models(HEAD))
    for tokens, found in training.exact(HEAD, list(training.TOY.tokens)).items():
        assert found == pytest.approx(divergence(student, teacher, 1, tokens).item(), rel=1e-12)


def test_every_contender_goes_from_short_to_long() -> None:
    listed = training.cases(training.FULL, memory=3.0)
    assert {case.contender for case in listed} == TRAINERS.keys()
    for contender in TRAINERS:
        assert tuple(case.tokens for case in listed if case.contender == contender) == training.FULL.tokens
    assert {case.limit for case in listed} == {3 * GIB}
    assert tuple(sorted(training.FULL.tokens)) == training.FULL.tokens


def test_the_bare_work_leaves_neither_gradients_nor_other_weights() -> None:
    student, teacher = training.models(HEAD)
    before = [weight.detach().clone() for weight in student.parameters()]
    assert training.bare_seconds(student, teacher, training.example(HEAD, TOKENS, 0)) > 0
    assert all(weight.grad is None and torch.equal(weight, old) for weight, old in zip(student.parameters(), before, strict=True))


@needs_proc
class TestWatch:
    def test_the_first_step_is_not_counted_and_yardsticks_lie_around_the_others(self) -> None:
        happened: list[str] = []
        watch = Watch(lambda: happened.append("yardstick") or 0.5, 2, float("inf"))
        goes_on = []
        for _ in range(3):
            watch.begin()
            happened.append("step")
            goes_on.append(watch.end())
        assert happened == ["step", "yardstick", "step", "yardstick", "step", "yardstick"]
        assert goes_on == [True, True, False]
        assert len(watch.timed.steps) == len(watch.timed.ratios) == len(watch.peaks) == 2

    def test_no_step_is_begun_after_its_patience(self) -> None:
        watch = Watch(lambda: 0.5, 100, 0.0)
        for expected in (True, False):
            watch.begin()
            assert watch.end() is expected

    def test_the_peak_is_that_of_the_step_without_the_yardsticks(self) -> None:
        size = 64 * MIB
        watch = Watch(lambda: float(torch.ones(4 * size // 4).sum()), 2, float("inf"))
        for _ in range(3):
            watch.begin()
            torch.ones(size // 4)
            watch.end()
        assert all(0.9 * size < peak < 1.5 * size for peak in watch.peaks)
        assert watch.process > size


@needs_proc
def test_the_command_writes_a_row_of_one_that_runs_and_of_one_that_fails(tmp_path: Path) -> None:
    """Liger's Triton kernels have nothing to run on where there is no GPU; another length is then not tried."""
    command = [sys.executable, "-m", "benchmarks.training", "--quick", "--out", str(tmp_path), "--repeats", "2", "--only"]
    for only in ("accelerate, kd forward_kl N=80", "use_liger_kernel"):
        done = subprocess.run([*command, only], capture_output=True, text=True, cwd=ROOT, env=os.environ, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    ran, failed, skipped = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert len(ran["ratios"]) == 2
    assert len(ran["losses"]) == 3
    assert ran["value_error"] < 1e-6
    assert ran["process_bytes"] > ran["peak_bytes"] > 0
    if not torch.cuda.is_available():
        assert failed["failed"]
        assert skipped["skipped"] == "not run: it failed at N = 80"
        assert line(skipped) in done.stdout


def row(contender: str, tokens: int, **more: Any) -> dict[str, Any]:
    case = next(case for case in training.cases(training.FULL) if (case.contender, case.tokens) == (contender, tokens))
    return {**case.facts, **more}


FIGURES: dict[str, Any] = {
    **{"seconds": 0.5, "ratio": 1.25, "ratios": [1.25], "value_error": 2e-7},
    **{"peak_bytes": 7 * MIB, "returned_bytes": 3 * MIB, "process_bytes": 9 * MIB},
}


def test_the_table_shows_speed_memory_errors_and_what_is_missing() -> None:
    said = "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: you tried to allocate 622329856 bytes."
    rows = [
        row("KDTrainer", 256, **FIGURES),
        row("KDTrainer", 1024, **FIGURES),
        row("TRL GKD", 256, **FIGURES | {"value_error": 5e-6}),
        row("TRL GKD", 1024, failed=said),
    ]
    machine = {"processor": "any", "threads": 1, "instruction_sets": ["plain"], "torch": "2", "trl": "9", "date": "today"}
    shown = readme.training_table({"machine": machine, "rows": rows})
    assert "each process may hold 8 GiB" in shown
    assert "| KDTrainer | 512 (1.25) | 2,048 (1.25) |" in shown
    assert "| TRL GKD | 512 (1.25) | failed |" in shown
    assert "| TRL GKD | 4 (7) | failed |" in shown
    assert "| TRL GKD | 5.0e-06 |" in shown
    assert "- TRL GKD: RuntimeError: DefaultCPUAllocator: you tried to allocate 622,329,856 bytes. (forward_kl at 152k" in shown


def test_the_committed_losses_are_right() -> None:
    """In every row that was measured: it is the same loss that all of them were timed with."""
    measured = [row for row in json.loads((RESULTS / "training.json").read_text())["rows"] if "ratio" in row]
    assert {row["contender"] for row in measured} == set(ON_CPUS)
    assert all(row["value_error"] < 1e-5 for row in measured)
