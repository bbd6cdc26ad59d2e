"""What a step takes of memory: the planned peak, in a process of its own, and a scratch that steps share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from tests.support import ROOT
from tests.support.cases import Case, draw
from tests.support.counting import MIB
from tests.support.needs import needs_proc

# Peak resident memory above what was there, less the returned gradients; of a step, and of what stays afterwards.
MEASURE = """
import functools, gc, json, sys
import torch
import kdkernels as kd
from kdkernels import backends
from tests.support.memory import status

def step(tokens, vocab, dim, budget, dtype, strategy, learns):
    hidden, weight = torch.ones(tokens, dim, dtype=dtype), torch.ones(vocab, dim, dtype=dtype)
    teacher, teacher_weight = torch.ones(tokens, dim, dtype=dtype), torch.ones(vocab, dim, dtype=dtype)
    labels = torch.zeros(tokens, dtype=torch.int64)
    learned = [hidden, weight]
    learned += [leaf for name, leaf in (("hidden", teacher), ("head", teacher_weight)) if name in learns]
    for leaf in learned:
        leaf.requires_grad_()
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = status("VmRSS")
    if strategy == "eager":
        log_q, log_p = ((rows @ head.mT).float().log_softmax(-1) for rows, head in ((hidden, weight), (teacher, teacher_weight)))
        kl = functools.partial(torch.nn.functional.kl_div, reduction="batchmean", log_target=True)
        loss = kl(log_q, log_p.detach())
        if learns:
            loss = loss + 0.5 * kl(log_p, log_q.detach()) + 0.5 * torch.nn.functional.nll_loss(log_p, labels)
        loss.backward()
    elif learns:
        both = kd.linear_okd_loss(hidden, weight, teacher, teacher_weight, labels, strategy=strategy, memory_budget=budget)
        (both.student + both.teacher).backward()
    else:
        kd.linear_kd_loss(hidden, weight, teacher, teacher_weight, strategy=strategy, memory_budget=budget).backward()
    return status("VmHWM") - before - sum(leaf.nbytes for leaf in learned)

for line in sys.stdin:
    tokens, vocab, dim, budget, dtype, backend, strategy, *learns = json.loads(line)
    sizes = dim, budget, getattr(torch, dtype), strategy, learns  # learns: of the teacher
    with backends.use(backend):
        step(64, 512, *sizes)
        kd.free_scratch()
        peak = step(tokens, vocab, *sizes)
        held = status("VmRSS")
        kd.free_scratch()
        print(peak, held - status("VmRSS"), flush=True)
"""


@pytest.fixture(scope="class")
def measured() -> Iterator[Callable[..., tuple[int, int]]]:
    """(peak, held) of a step, in a process that does nothing else: see MEASURE for what a step is."""
    # What is freed leaves the process at once: else glibc keeps some of it, and the peak is not what was allocated.
    # Two threads, as the plan counts what each keeps of a row.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "2"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", MEASURE], cwd=ROOT, env=environment, **pipes) as process:

        def run(*step: Any) -> tuple[int, int]:
            print(json.dumps(step), file=process.stdin, flush=True)
            line = process.stdout.readline()  # type: ignore[union-attr]
            assert line, "the process ended; its error is above"
            peak, held = map(int, line.split())
            return peak, held

        yield run


@needs_proc
class TestMemory:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_peak_is_the_budget_whatever_the_token_count(self, measured: Any, dtype: str) -> None:
        vocab, dim, budget = 32768, 64, 64 * MIB
        counts, peaks = (512, 2048), {}
        for count_ in counts:
            peak, held = measured(count_, vocab, dim, budget, dtype, kd.backend(), "tokens")
            peaks[count_] = peak
            plan = kd.plan(count_, vocab, dim, dim, getattr(torch, dtype), memory_budget=budget, strategy="tokens")
            assert plan.logits_bytes <= budget
            assert peak <= plan.scratch_bytes + 16 * MIB
            assert peak >= plan.scratch_bytes - 16 * MIB, "the plan asks for more than is used"
            assert held <= budget + 9 * MIB  # with the block of a widened head
        assert abs(peaks[2048] - peaks[512]) <= 16 * MIB

    def test_the_reference_keeps_to_it_too(self, measured: Any) -> None:
        vocab, dim, budget = 32768, 64, 64 * MIB
        for strategy in ("tokens", "vocab"):
            peak, _ = measured(512, vocab, dim, budget, "float32", "reference", strategy)
            assert peak <= budget + 16 * MIB

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("strategy", ["tokens", "vocab", "eager"])
    def test_the_planned_peak_is_within_a_tenth_of_the_measured_one(self, measured: Any, strategy: str, dtype: str) -> None:
        tokens, vocab, dim = 1024, 40_000, 128
        for budget in (64 * MIB, 256 * MIB)[: 1 if strategy == "eager" else 2]:
            peak, _ = measured(tokens, vocab, dim, budget, dtype, kd.backend(), strategy)
            asked = "tokens" if strategy == "eager" else strategy
            plan = kd.plan(tokens, vocab, dim, dim, getattr(torch, dtype), memory_budget=budget, strategy=asked)
            own = plan.eager_scratch_bytes if strategy == "eager" else plan.scratch_bytes
            inputs_and_gradients = plan.peak_bytes - plan.scratch_bytes
            whole = peak + inputs_and_gradients
            assert own + inputs_and_gradients == pytest.approx(whole, rel=0.1), f"own: {own / MIB:.0f} of {peak / MIB:.0f} MiB"

    @pytest.mark.parametrize(("dtype", "dim"), [("float32", 16), ("bfloat16", 256)])
    def test_many_tokens_take_no_copy_of_their_gradient(self, measured: Any, dtype: str, dim: int) -> None:
        """By blocks of columns, 16-bit parts of dH are added to a float32 sum: that took half of it again, and more."""
        tokens, vocab, budget = 32_768, 8192, 64 * MIB
        peak, _ = measured(tokens, vocab, dim, budget, dtype, kd.backend(), "vocab")
        plan = kd.plan(tokens, vocab, dim, dim, getattr(torch, dtype), memory_budget=budget, strategy="vocab")
        assert peak == pytest.approx(plan.scratch_bytes, rel=0.1), f"{peak / MIB:.0f} of {plan.scratch_bytes / MIB:.0f} MiB"

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize(
        ("strategy", "learns"),
        [("tokens", ("hidden",)), ("tokens", ("hidden", "head")), ("vocab", ("hidden",)), ("eager", ("hidden",))],
    )
    def test_that_of_two_learners_too(self, measured: Any, strategy: str, learns: tuple[str, ...], dtype: str) -> None:
        count_, width, dim, budget = 1024, 40_000, 128, 64 * MIB
        peak, _ = measured(count_, width, dim, budget, dtype, kd.backend(), strategy, *learns)
        plan = kd.plan(
            *(count_, width, dim, dim, getattr(torch, dtype)),
            memory_budget=budget,
            strategy="tokens" if strategy == "eager" else strategy,
            online_teacher=True,
            train_teacher_head="head" in learns,
        )
        own = plan.eager_scratch_bytes if strategy == "eager" else plan.scratch_bytes
        inputs_and_gradients = plan.peak_bytes - plan.scratch_bytes
        assert own + inputs_and_gradients == pytest.approx(peak + inputs_and_gradients, rel=0.1)


class TestScratch:
    """It stays between calls, and nothing of one call shows in another."""

    def results(self, drawn: Case, **more: Any) -> list[Tensor]:
        return list(drawn.run(**more).values())

    def test_calls_of_all_sizes_and_dtypes_in_turn(self) -> None:
        drawn = [
            draw(seed, (tokens_,), vocab, dtype=dtype)
            for seed, (tokens_, vocab) in enumerate([(6, 37), (200, 600), (3, 5), (40, 1003), (6, 37)])
            for dtype in (torch.float32, torch.bfloat16, torch.float64)
        ]
        expected = []
        for one in drawn:
            kd.free_scratch()
            expected.append(self.results(one))
        for one, right in zip(drawn, expected, strict=True):
            for found, value in zip(self.results(one), right, strict=True):
                torch.testing.assert_close(found, value, rtol=0, atol=0)

    def test_threads_do_not_share_it(self) -> None:
        drawn = [draw(seed, (64,), 2000) for seed in range(4)]
        expected = [self.results(one) for one in drawn]
        found: dict[int, list[list[Tensor]]] = {at: [] for at in range(4)}

        def work(at: int) -> None:
            for _ in range(5):
                found[at].append(self.results(drawn[at]))

        threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for at, right in enumerate(expected):
            assert len(found[at]) == 5
            for run in found[at]:
                for one, value in zip(run, right, strict=True):
                    torch.testing.assert_close(one, value, rtol=1e-6, atol=1e-8)

    def test_made_in_inference_mode_it_serves_training(self) -> None:
        drawn = draw()
        kd.free_scratch()
        with torch.inference_mode():
            drawn.loss()
        assert all(result.isfinite().all() for result in self.results(drawn))

    def test_a_failed_call_gives_it_back(self) -> None:
        drawn = draw()
        with pytest.raises(ValueError, match="labels"):
            replace(drawn, labels=torch.full((6,), 99)).loss()
        kd.free_scratch()
        assert drawn.loss().isfinite()
