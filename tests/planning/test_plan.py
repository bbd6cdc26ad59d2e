"""``kd.plan`` counts what a step does: products, chunks, bytes, the strategy that runs, and on a GPU its time."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd
from kdkernels.backends.products import HeadProducts
from kdkernels.cli import main
from kdkernels.engine import run as loop
from kdkernels.engine import scratch
from kdkernels.engine.cut import CUTS, STRATEGIES, Cut, chunk_rows
from kdkernels.planning import devices, roofline
from kdkernels.planning.plan import default_budget
from tests.support.cases import Case, draw, parameters, running, strategies_that_run
from tests.support.counting import MIB, STUDENT, TEACHER, US, UT, N, Products, V, case, count
from tests.support.oracle import Options
from tests.support.trace import Trace


class TestPlan:
    @pytest.mark.parametrize("train_head", [True, False])
    def test_it_counts_the_products(self, train_head: bool) -> None:
        plan = kd.plan(N, V, STUDENT, TEACHER, train_head=train_head)
        assert plan.flops == count(case(), ("student_hidden", "student_weight") if train_head else ("student_hidden",))

    @pytest.mark.parametrize("tokens_", [1, 15, 16, 24, 100, 128, 1000])
    @pytest.mark.parametrize("rows", [1, 3, 16, 17, 50, 70, 100, 4000])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_the_loss_runs_the_planned_chunks(
        self, dtype: torch.dtype, rows: int, tokens_: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        per_row = kd.plan(1, V, STUDENT, TEACHER, dtype).logits_bytes
        plan = kd.plan(tokens_, V, STUDENT, TEACHER, dtype, memory_budget=rows * per_row, strategy="tokens")
        drawn = draw(tokens=(tokens_,), vocab=V, dims=(STUDENT, TEACHER), dtype=dtype)
        seen: list[int] = []
        logits = HeadProducts.logits
        monkeypatch.setattr(HeadProducts, "logits", lambda head, hidden, out: seen.append(len(hidden)) or logits(head, hidden, out))
        with torch.no_grad():
            drawn.loss(memory_budget=rows * per_row, strategy="tokens")
        used = seen[::2]  # student and teacher in turn
        assert max(used) == plan.chunk_rows
        assert len(used) == plan.chunks
        assert sum(used) == tokens_
        assert plan.chunk_rows <= rows
        assert plan.logits_bytes == plan.chunk_rows * per_row

    @pytest.mark.parametrize("count_", [1, 2, 31, 512, 4096, 5000])
    @pytest.mark.parametrize("budget", [1, 10_000, 10**6, 10**9])
    def test_chunks_are_even_and_fit(self, budget: int, count_: int) -> None:
        rows = chunk_rows(count_, 1000, 8, budget, torch.device("cpu"))
        assert 1 <= rows <= count_
        assert rows == 1 or rows * 8000 <= budget
        chunks = -(-count_ // rows)
        assert rows * chunks - count_ < max(16, rows), "the last chunk is not a stub"

    def test_sizes_add_up(self) -> None:
        plan = kd.plan(2048, 32768, 64, 96, torch.bfloat16, memory_budget=64 * MIB, strategy="tokens")
        assert plan.logits_bytes <= 64 * MIB
        assert plan.accumulator_bytes == 32768 * 64 * 4
        assert plan.scratch_bytes >= plan.logits_bytes + plan.accumulator_bytes
        inputs = 2 * ((2048 + 32768) * (64 + 96) + (2048 + 32768) * 64)
        assert plan.peak_bytes == plan.scratch_bytes + inputs
        assert kd.plan(2048, 32768, 64, 96, torch.bfloat16, train_head=False).accumulator_bytes == 0
        assert plan.eager_peak_bytes > plan.peak_bytes
        assert plan.strategy == "tokens"
        streamed = kd.plan(2048, 32768, 64, 96, torch.bfloat16, memory_budget=64 * MIB, strategy="vocab")
        assert (streamed.strategy, streamed.chunks, plan.blocks) == ("vocab", 1, 1)
        assert streamed.blocks * streamed.block_columns >= 32768 > (streamed.blocks - 1) * streamed.block_columns
        assert streamed.logits_bytes <= 64 * MIB
        assert streamed.accumulator_bytes == 2048 * 64 * 4

    @pytest.mark.parametrize("memory_budget", [1, 2_000, 20_000, 200_000, 10**7])
    @pytest.mark.parametrize("name", ["forward_kl", "jsd"])
    def test_auto_runs_what_the_plan_says(self, name: str, memory_budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
        ran = strategies_that_run(monkeypatch)
        drawn = draw(tokens=(200,), vocab=500, dims=(STUDENT, TEACHER), options=Options(name))
        drawn.run(memory_budget=memory_budget)
        plan = kd.plan(200, 500, STUDENT, TEACHER, memory_budget=memory_budget, divergence=name)
        assert ran[0] == plan.strategy

    def test_heads_read_for_few_rows_each_cost_more_than_multiplying_twice(self) -> None:
        chosen = {mib: kd.plan(1024, 32_000, 512, 1024, memory_budget=mib * MIB).strategy for mib in (1, 64, 512)}
        assert chosen == {1: "vocab", 64: "tokens", 512: "tokens"}

    def test_one_chunk_is_never_streamed(self) -> None:
        for tokens_ in (1, 7, 100):
            assert kd.plan(tokens_, V, STUDENT, TEACHER).strategy == "tokens"

    @pytest.mark.parametrize("name", ["tokens", "vocab", "student_dim", "teacher_dim", "memory_budget"])
    def test_sizes_below_one_are_refused(self, name: str) -> None:
        sizes: dict[str, Any] = {"tokens": 8, "vocab": 8, "student_dim": 8, "teacher_dim": 8, "memory_budget": 8}
        with pytest.raises(ValueError, match=rf"{name}.*at least 1.*0"):
            kd.plan(**{**sizes, name: 0})


def test_what_another_strategy_takes_follows_from_its_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strategy is a function that returns a Cut: here chunks in blocks, and all in one."""
    sizes: Any = (8192, 151_936, 896, 3584, torch.bfloat16)
    vocab = kd.plan(*sizes, device="H100", strategy="vocab", memory_budget=2**29)
    for name, rows in (("half", 4096), ("whole", 8192)):
        monkeypatch.setitem(CUTS, name, lambda size, rows=rows: Cut(size, rows, vocab.block_columns, whole_rows=False))
    monkeypatch.setattr("kdkernels.planning.plan.STRATEGIES", (*STRATEGIES, "half", "whole"))
    half, whole = (kd.plan(*sizes, device="H100", strategy=name) for name in ("half", "whole"))  # type: ignore[arg-type]
    assert (half.chunks, half.blocks, half.flops) == (2, vocab.blocks, vocab.flops)
    assert half.logits_bytes * 2 == whole.logits_bytes == vocab.logits_bytes
    assert whole.seconds == vocab.seconds < half.seconds, "the heads are read twice"  # type: ignore[operator]
    monkeypatch.setitem(CUTS, "uncut", lambda size: Cut(size, size.tokens, size.vocab, whole_rows=True))
    assert kd.plan(*sizes, device="H100").strategy == "uncut", "auto compares them all"


class TestOnAGpu:
    """Budget and cuts there; nothing runs."""

    QWEN = (151_936, 896, 3584)

    def test_the_default_budget_is_a_sixteenth_of_the_devices_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = torch.device("cuda", 0)
        for on in devices.DEVICES.values():
            assert default_budget(cuda, on) == on.memory // 16
            largest = kd.plan(2**20, *self.QWEN, torch.bfloat16, device=on.name, strategy="tokens").logits_bytes
            assert 0.9 * on.memory / 16 < largest <= on.memory / 16, "the plan takes the named device's"
        assert default_budget(cuda) == devices.DEVICES["H100"].memory // 16, "none here and none named"
        assert default_budget(torch.device("cpu")) == 512 * MIB
        assert default_budget(torch.device("mps")) == default_budget(torch.device("xpu")) == 1024 * MIB
        asked: list[torch.device] = []

        def properties(device: torch.device) -> SimpleNamespace:
            asked.append(device)
            return SimpleNamespace(total_memory=85_000_000_000)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        devices.gpu_memory.cache_clear()
        try:
            assert {default_budget(cuda) for _ in range(3)} == {85_000_000_000 // 16}
            assert default_budget(cuda, devices.DEVICES["H200"]) == 141_000_000_000 // 16
        finally:
            devices.gpu_memory.cache_clear()
        assert asked == [cuda], "once, and not in each step"

    def test_chunks_are_of_one_size_and_fill_the_tiles_of_products(self) -> None:
        plan = kd.plan(8192, *self.QWEN, torch.bfloat16, device="H100", strategy="tokens")
        assert (plan.chunks, plan.chunk_rows) == (3, 2816)  # a third of 8192 is 2731
        assert kd.plan(3000, *self.QWEN, torch.bfloat16, device="H100", strategy="tokens").chunk_rows == 3000, "one where all fit"

    @pytest.mark.parametrize("count_", [1, 2, 31, 512, 4096, 5000])
    @pytest.mark.parametrize("most", [1, 3, 8, 9, 20, 40, 100, 200, 1000, 4000])
    def test_chunks_are_multiples_of_128_where_the_budget_allows(self, most: int, count_: int) -> None:
        """Of a vocabulary of 1000, whose rows take 1024."""
        rows = chunk_rows(count_, 1000, 8, most * 1024 * 8 + 1, torch.device("cuda"))
        assert rows <= most
        if count_ <= most:
            assert rows == count_
        else:
            even = -(-count_ // -(-count_ // most))
            multiple = next(size for size in (128, 64, 32, 16, 8, 1) if -(-even // size) * size <= most)
            assert rows % multiple == 0
            assert rows - even < multiple

    @pytest.mark.parametrize("strategy", ["tokens", "vocab"])
    @pytest.mark.parametrize("budget", [MIB, 100 * MIB, 1000 * MIB])
    def test_a_budget_is_kept_to_whatever_rows_are_padded_to(self, budget: int, strategy: str) -> None:
        for vocab_ in (50_257, 262_147):
            plan = kd.plan(8192, vocab_, 896, 3584, torch.bfloat16, device="H100", memory_budget=budget, strategy=strategy)
            assert budget / 3 < plan.logits_bytes <= budget or plan.chunk_rows == 1
        padded = kd.plan(512, 50_257, 64, 64, torch.bfloat16, device="H100", strategy="tokens")
        assert padded.logits_bytes == 512 * 50_304 * (4 + 4 + 2)

    def test_auto_is_what_the_named_device_is_predicted_to_do_faster(self) -> None:
        chosen = set()
        for device, mib, name in itertools.product(devices.DEVICES, (4, 16, 64, 256, None), ("forward_kl", "jsd")):
            auto, tokens_, vocab_ = (
                kd.plan(
                    *(8192, *self.QWEN, torch.bfloat16),
                    device=device,
                    memory_budget=None if mib is None else mib * MIB,
                    divergence=name,
                    strategy=strategy,
                )
                for strategy in ("auto", "tokens", "vocab")
            )
            assert auto == min(tokens_, vocab_, key=lambda plan: plan.seconds or 0.0)
            chosen.add((auto.strategy, mib is None))
        assert chosen == {("tokens", True), ("tokens", False), ("vocab", False)}


class TestOnlineTeacher:
    """The plan of two learners, which is that of ``linear_okd_loss``."""

    SIZES = (N, V, STUDENT, TEACHER)

    def step(self, drawn: Case, *, teacher_head: bool = False, frozen_head: bool = False, **more: Any) -> None:
        learn = {"student_hidden", "teacher_hidden"}
        learn |= {"teacher_weight"} if teacher_head else set()
        learn |= set() if frozen_head else {"student_weight"}
        names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
        inputs = [getattr(drawn, name).detach().requires_grad_(name in learn) for name in names]
        options = {"divergence": drawn.options.divergence, "teacher_alpha": 1.0, **more}
        sum(kd.linear_okd_loss(*inputs, None, **options)).backward()  # type: ignore[union-attr]

    @pytest.mark.parametrize("name", ["forward_kl", "jsd"])
    @pytest.mark.parametrize("strategy", ["tokens", "vocab"])
    @pytest.mark.parametrize("memory_budget", [None, 16 * N * 12])
    @pytest.mark.parametrize("heads", [(True, False), (True, True), (False, False)])
    def test_it_counts_the_products(self, heads: tuple[bool, bool], memory_budget: int | None, strategy: str, name: str) -> None:
        train_head, teacher_head = heads
        options: dict[str, Any] = {"strategy": strategy, "memory_budget": memory_budget}
        with Products() as products:
            self.step(case(options=Options(name)), teacher_head=teacher_head, frozen_head=not train_head, **options)
        learn = {"train_head": train_head, "online_teacher": True, "train_teacher_head": teacher_head}
        assert kd.plan(*self.SIZES, **options, **learn, divergence=name).flops == products.flops

    def test_a_gpus_streaming_kernels_multiply_for_each_learner(self) -> None:
        for name, student in (("forward_kl", 2), ("jsd", 3)):
            plan = kd.plan(*self.SIZES, device="H100", strategy="vocab", divergence=name, online_teacher=True)
            assert plan.flops == (student + 2) * (US + UT) + 2 * US + UT

    @pytest.mark.parametrize("variant", parameters(("native", "triton")))
    @pytest.mark.parametrize("strategy", ["tokens", "vocab"])
    @pytest.mark.parametrize("dtypes", list(itertools.product((torch.float32, torch.bfloat16), repeat=2)))
    @pytest.mark.parametrize("width", [V, 101])
    def test_the_loss_takes_the_planned_scratch(
        self, width: int, dtypes: tuple[torch.dtype, torch.dtype], strategy: str, variant: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With what lies between the rows, of which the wider ones are padded on a GPU."""
        taken, borrowed = [], loop.borrowed

        def recording(block: int, tiles: Any, budget: int, device: torch.device) -> Any:
            taken.append(sum(rows * scratch.row_stride(columns, device) * of.itemsize for (rows, columns), of in tiles))
            return borrowed(block, tiles, budget, device)

        monkeypatch.setattr(loop, "borrowed", recording)
        drawn = draw(tokens=(N,), vocab=width, dims=(STUDENT, TEACHER), dtype=dtypes[0])
        drawn = replace(drawn, **{name: getattr(drawn, name).to(dtypes[1]) for name in ("teacher_hidden", "teacher_weight")})
        options: dict[str, Any] = {"strategy": strategy, "memory_budget": 3 * N * width}
        with running(variant):
            self.step(drawn, **options)
            plan = kd.plan(N, width, STUDENT, TEACHER, dtypes[0], teacher_dtype=dtypes[1], **options, online_teacher=True)
        assert taken == [plan.logits_bytes]
        assert plan.logits_bytes <= 3 * N * width

    @pytest.mark.parametrize(("memory_budget", "alone", "both"), [(4096, "vocab", "tokens"), (MIB, "tokens", "vocab")])
    def test_auto_knows_the_second_learner(
        self, memory_budget: int, alone: str, both: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Budgets with which the student by itself would go the other way."""
        ran = strategies_that_run(monkeypatch)
        drawn = draw(tokens=(200,), vocab=500, dims=(STUDENT, TEACHER))
        self.step(drawn, memory_budget=memory_budget)
        drawn.run(memory_budget=memory_budget)
        assert (ran[0], ran[-1]) == (both, alone)
        for online_teacher, strategy in ((True, both), (False, alone)):
            plan = kd.plan(200, 500, STUDENT, TEACHER, memory_budget=memory_budget, online_teacher=online_teacher)
            assert plan.strategy == strategy

    def test_sizes_add_up(self) -> None:
        sizes = (2048, 32768, 64, 96)
        frozen, trained = (
            kd.plan(
                *(*sizes, torch.bfloat16),
                memory_budget=64 * MIB,
                strategy="tokens",
                online_teacher=True,
                train_teacher_head=train_teacher_head,
            )
            for train_teacher_head in (False, True)
        )
        inputs, student, teacher = (2048 + 32768) * (64 + 96), (2048 + 32768) * 64, 2048 * 96
        assert frozen.peak_bytes == frozen.scratch_bytes + 2 * (inputs + student + teacher)
        assert frozen.accumulator_bytes == 32768 * 64 * 4
        assert trained.peak_bytes == trained.scratch_bytes + 2 * (inputs + student + teacher + 32768 * 96)
        assert trained.accumulator_bytes == 32768 * (64 + 96) * 4
        streamed = kd.plan(*sizes, torch.bfloat16, memory_budget=64 * MIB, strategy="vocab", online_teacher=True)
        assert streamed.accumulator_bytes == 2048 * (64 + 96) * 4

    def test_a_teachers_head_is_not_trained_alone(self) -> None:
        with pytest.raises(ValueError, match=r"train_teacher_head is True.*online_teacher=True"):
            kd.plan(*self.SIZES, train_teacher_head=True)


LEARNED = {"online_teacher": True}, {"online_teacher": True, "train_teacher_head": True}


class TestPredictedTime:
    """Of two learners: the closed forms of the roofline."""

    SIZES = (512, 4096, 64, 96)
    US, UT = 2 * 512 * 4096 * 64, 2 * 512 * 4096 * 96

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("learned", LEARNED)
    @pytest.mark.parametrize("cached_row", [0, 4 * 4096])
    def test_eagers_is_what_its_operations_move(self, cached_row: int, learned: dict[str, bool], dtype: torch.dtype) -> None:
        count_, width, *dims = self.SIZES
        hidden = [torch.empty(count_, dim, dtype=dtype, device="meta", requires_grad=True) for dim in dims]
        trained = (True, learned.get("train_teacher_head", False))
        heads = [
            torch.empty(width, dim, dtype=dtype, device="meta", requires_grad=train)
            for dim, train in zip(dims, trained, strict=True)
        ]
        labels = torch.zeros(count_, dtype=torch.int64, device="meta")
        with Trace(cached_row) as counted:
            log_q, log_p = ((rows @ head.t()).float().log_softmax(-1) for rows, head in zip(hidden, heads, strict=True))
            kl = functools.partial(F.kl_div, reduction="batchmean", log_target=True)
            (kl(log_q, log_p.detach()) + 0.5 * kl(log_p, log_q.detach()) + 0.5 * F.nll_loss(log_p, labels)).backward()
        closed = roofline.eager_passes(*self.SIZES, dtype, **learned, cached_row=cached_row)
        assert roofline.total_flops(closed) == roofline.total_flops(counted.passes)
        assert roofline.total_bytes(closed) == pytest.approx(roofline.total_bytes(counted.passes), rel=1e-3)
        assert sum(step.launches for step in closed) == sum(1 for step in counted.passes if step.bytes >= count_ * width)

    @pytest.mark.parametrize("chunks", [1, 3])
    def test_tokens_makes_the_fewest_products(self, chunks: int) -> None:
        for learned, teacher in zip(LEARNED, (2, 3), strict=True):
            passes = roofline.tokens_passes(*self.SIZES, torch.bfloat16, chunk_rows=-(-512 // chunks), **learned)
            assert roofline.total_flops(passes) == 3 * self.US + teacher * self.UT

    @pytest.mark.parametrize("blocks", [1, 3])
    @pytest.mark.parametrize(("name", "more"), [("forward_kl", 0), ("jsd", 1)])
    def test_vocab_multiplies_for_each_learner_unless_they_share(self, name: str, more: int, blocks: int) -> None:
        for learned, gradients_ in zip(LEARNED, (self.UT, 2 * self.UT), strict=True):
            for shared, sweeps in ((True, 2 + more), (False, 4 + more)):
                passes = roofline.vocab_passes(
                    *self.SIZES, torch.bfloat16, block_columns=-(-4096 // blocks), divergence=name, shared=shared, **learned
                )
                assert roofline.total_flops(passes) == sweeps * (self.US + self.UT) + 2 * self.US + gradients_

    def test_of_one_chunk_the_teacher_reads_both_logits_again_and_moves_its_own_gradient(self) -> None:
        """By hand, in bfloat16."""
        rows, width, _, teacher = self.SIZES
        logits, grad, head, hidden = 4 * rows * width, 2 * rows * width, 2 * width * teacher, 2 * rows * teacher
        row_kernel = 2 * (2 * logits) + grad + rows * (2 + 6) * 4  # weight, t; six columns
        alone, both, with_head = (
            roofline.total_bytes(roofline.tokens_passes(*self.SIZES, torch.bfloat16, **learned)) for learned in ({}, *LEARNED)
        )
        assert both - alone == row_kernel + grad + head + hidden
        assert with_head - both == grad + hidden + head

    @pytest.mark.parametrize("strategy", ["tokens", "vocab"])
    def test_a_second_learner_takes_longer_and_its_head_longer_still(self, strategy: str) -> None:
        plans = [
            kd.plan(8192, 151_936, 896, 3584, torch.bfloat16, device="H100", strategy=strategy, **learned)
            for learned in ({}, *LEARNED)
        ]
        for name in ("seconds", "flops", "peak_bytes", "eager_seconds", "eager_flops", "eager_peak_bytes"):
            found = [getattr(plan, name) for plan in plans]
            assert found == sorted(found), name
            assert found[0] < found[1], name

    def test_the_command_line_plans_both_learners(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", "--student=Qwen2.5-0.5B", "--teacher=151936x3584", "--tokens=8192", "--okd"]) == 0
        shown = capsys.readouterr().out
        assert "OKD" in shown.splitlines()[0]
        planned = kd.plan(8192, 151_936, 896, 3584, torch.bfloat16, device="H100", strategy="tokens", online_teacher=True)
        for name, peak in (("eager", planned.eager_peak_bytes), ("tokens", planned.peak_bytes)):
            row = next(line.split() for line in shown.splitlines() if line.startswith(f"{name} "))
            assert float(row[1]) == round(peak / 1e9, 2)


def test_the_backend_is_named() -> None:
    assert kd.backend() == kd.backend("cpu") == kd.backend(torch.device("cpu"), torch.bfloat16)
    assert kd.backend("cpu", torch.float64) == "reference"
    assert kd.backend("cpu") in ("native", "reference")
