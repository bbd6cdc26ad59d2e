"""The report of the GPU suite: its tables and what a plan predicted beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import kdkernels as kd
from benchmarks import gpu, gpu_checks, gpu_report, gpu_times
from benchmarks.cases import DTYPES, HEADS, LOSSES
from tests.benchmarks.test_gpu_suite import Record

H100: Record = {"device": "NVIDIA H100", "memory_bytes": 80 * 2**30, "date": "2026-11-27", "command": "python -m benchmarks.gpu"}


def row(contender: str, milliseconds: float, value: float = 1.0) -> Record:
    return {
        **{"stage": "ours", "head": "qwen2.5", "loss": "jsd", "tokens": 8192, "contender": contender},
        **{"median_ms": milliseconds, "ratio": milliseconds / 20, "products_ms": 20.0, "share_of_product_rate": 20 / milliseconds},
        **{"peak_bytes": 3 * 2**30, "first_s": 1.5, "loss_value": value},
    }


def blocks_row(candidate: str, statistics: float, gradient: float) -> Record:
    return {
        **{"stage": "blocks", "head": "qwen2.5", "loss": "jsd", "tokens": 8192, "candidate": candidate, "first_s": 1.0},
        **{"kernels": {"statistics_kernel": statistics, "gradient_kernel": gradient}, "median_ms": statistics + gradient},
    }


class TestReport:
    def text(self, tmp_path: Path, *records: Record, tail: str = "") -> str:
        path = tmp_path / "results.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
        return gpu_report.text(path)

    def test_a_line_that_was_cut_off_is_ignored_and_said(self, tmp_path: Path) -> None:
        text = self.text(tmp_path, H100, row("vocab", 50.0), tail='{"stage": "ours", "head')
        assert "50.00" in text
        assert "1 line of" in text
        assert "cut off" in text

    def test_results_go_on_behind_a_line_that_was_cut_off(self, tmp_path: Path) -> None:
        self.text(tmp_path, H100, tail='{"stage": "ours", "head')
        gpu.append(tmp_path / "results.jsonl", row("vocab", 50.0))
        machines, found, cut = gpu_report.read(tmp_path / "results.jsonl")
        assert (machines, found, cut) == ([H100], [row("vocab", 50.0)], 1)

    def test_time_ratio_memory_and_share_stand_beside_the_contender(self, tmp_path: Path) -> None:
        text = self.text(tmp_path, H100, row("tokens 8 GiB", 40.0), {**row("vocab", 1.0), "failed": "OutOfMemoryError: 9 GiB"})
        assert "qwen2.5, jsd, 8192 tokens: the bare products take 20.00 ms" in text
        assert "40.00 2.00 3.00 50% 1.5 tokens 8 GiB" in " ".join(text.split())
        assert "vocab: OutOfMemoryError: 9 GiB" in text

    def test_the_later_of_two_results_counts(self, tmp_path: Path) -> None:
        text = self.text(tmp_path, H100, row("vocab", 50.0), {**H100, "date": "2026-11-28"}, row("vocab", 30.0))
        assert "30.00" in text
        assert "50.00" not in text
        assert "2026-11-28" in text

    def test_contenders_whose_losses_differ_are_shown(self, tmp_path: Path) -> None:
        assert "DIFFER" not in self.text(tmp_path, H100, row("vocab", 50.0), row("eager", 90.0, 1.001))
        assert "THE VALUES OF THE LOSS DIFFER: vocab 1, eager 1.1" in self.text(
            tmp_path, H100, row("vocab", 50.0), row("eager", 90.0, 1.1)
        )

    def test_a_cross_entropy_is_no_loss_that_differs(self, tmp_path: Path) -> None:
        loss = {"loss": "forward_kl"}
        rows = row("vocab", 50.0) | loss, row("torchtune", 90.0, 7.0) | loss
        assert "DIFFER" not in self.text(tmp_path, H100, *rows)
        assert "DIFFER: vocab 1, eager 7" in self.text(tmp_path, H100, *rows, row("eager", 90.0, 7.0) | loss)

    def test_the_best_blocks_are_marked_for_each_kernel_and_together(self, tmp_path: Path) -> None:
        text = self.text(tmp_path, H100, blocks_row("wide", 20.0, 9.0), blocks_row("tall", 15.0, 10.0))
        words = [line.split() for line in text.splitlines()]
        assert ["*25.000", "*15.00", "10.00", "tall"] in words
        assert ["29.000", "20.00", "*9.00", "wide"] in words
        assert words.index(["*25.000", "*15.00", "10.00", "tall"]) < words.index(["29.000", "20.00", "*9.00", "wide"])

    def test_a_candidate_that_was_only_compiled_replaces_no_time(self, tmp_path: Path) -> None:
        timed = blocks_row("tall", 15.0, 10.0)
        compiled = {name: timed[name] for name in ("stage", "head", "loss", "tokens", "candidate", "first_s")}
        assert "*25.000" in self.text(tmp_path, H100, timed, compiled)

    def test_failed_checks_say_why_and_skipped_ones_are_counted(self, tmp_path: Path) -> None:
        check = {"stage": "checks", "check": "accuracy", "strategy": "vocab", "dtype": "bf16"}
        text = self.text(
            *(tmp_path, H100, {**check, "divergence": "jsd", "passed": False, "reason": "loss: error 3"}),
            *({**check, "divergence": "forward_kl", "passed": True}, {**check, "divergence": "taid", "skipped": "no memory"}),
        )
        assert "checks: 1 passed, 1 failed, 1 skipped" in text
        assert "FAIL  accuracy vocab bf16 jsd: loss: error 3" in text
        assert "skipped 1: no memory" in text

    def test_a_profile_shows_its_kernels_and_the_share_without_one(self, tmp_path: Path) -> None:
        kernels = [{"name": "gradient_kernel", "calls": 3, "ms": 7.25}]
        facts = {"stage": "profile", "head": "gemma3", "loss": "jsd", "tokens": 8192, "contender": "vocab"}
        text = self.text(
            *(tmp_path, H100),
            {**facts, "step_ms": 10.0, "kernel_ms": 7.25, "share_without_kernel": 0.275, "kernels": kernels},
            {**facts, "loss": "forward_kl", "step_ms": 9.0, "kernel_ms": 9.0, "share_without_kernel": 0.0, "kernels": kernels}
            | {"replayed_ms": 8.0, "replayed_ratio": 1.25},
        )
        assert "gemma3 jsd 8192 tokens, vocab: a step takes 10.00 ms, 27.5% of it without a kernel\n" in text
        assert "a step takes 9.00 ms, 0.0% of it without a kernel; from a CUDA graph 8.00 ms, 1.25 x products" in text
        assert "7.250 3 gradient_kernel" in " ".join(text.split())

    def test_what_broke_off_and_what_was_not_run_is_listed(self, tmp_path: Path) -> None:
        text = self.text(
            *(tmp_path, H100, {"stage": "ours", "part": "time gemma3 8192 jsd vocab", "broken": "not done after 40 s"}),
            {"stage": "ours", "seconds": 90.0, "limit_s": 90, "not_run": ["time gemma3 8192 jsd eager"]},
        )
        assert "BROKE time gemma3 8192 jsd vocab: not done after 40 s" in text
        assert "ours: 90 of 90 s; not run: time gemma3 8192 jsd eager" in text


class TestPlan:
    """What a lease is spent on."""

    def test_four_stages_and_three_and_the_last_one_fit_five_and_a_half_minutes_each(self) -> None:
        limits = list(gpu.LIMITS.values())
        assert list(gpu.LIMITS) == ["smoke", "checks", "ours", "profile", "rows", "blocks", "others", "sanitizer"]
        assert sum(limits[:4]) <= 330
        assert sum(limits[4:7]) <= 330
        assert gpu.LIMITS["sanitizer"] <= 330
        assert list(gpu.parts("short")) == list(gpu.LIMITS)

    def test_no_item_may_take_its_whole_stage(self) -> None:
        for stage, parts in gpu.parts("short").items():
            assert all(part.limit < gpu.LIMITS[stage] for part in parts)

    @pytest.mark.parametrize("size", ["short", "full"])
    def test_every_check_of_the_library_is_run(self, size: str) -> None:
        items = [(*part.arguments, *item) for part in gpu.parts(size)["checks"] for item in part.items]
        assert len(items) == len(set(items))
        of_divergence = {item[:4] for item in items if item[3] is not None}
        variants = (len(gpu.STRATEGIES) + 1) * len(DTYPES) + 2 * 2  # strategies, cluster rows; both ways to 16-bit logits
        assert len(of_divergence) == variants * len(kd.divergences())
        assert {item[5] for item in items if item[4] == "accuracy"} == set(gpu_checks.SPREADS)

    def test_small_losses_compile_what_ours_times(self) -> None:
        stages = gpu.parts("short")
        first = [part for part in stages["ours"] if part.together]
        assert {(*part.arguments, *part.items[0]) for part in first} == {
            ("short", strategy, loss, "bf16") for strategy in gpu.STRATEGIES for loss in ("forward_kl", "jsd")
        }
        assert set(first) <= set(stages["smoke"])
        assert set(first) <= set(stages["profile"])

    def test_only_what_takes_no_times_runs_side_by_side(self) -> None:
        for stage, parts in gpu.parts("short").items():
            for part in parts:
                assert part.together == (part.name.split()[0] in ("loss", "check", "compile")), (stage, part.name)

    def test_heads_losses_and_contenders(self) -> None:
        short, full = gpu.parts("short"), gpu.parts("full")
        timed = [(part.name, item) for part in short["ours"] if not part.together for item in part.items]
        assert timed == [
            (f"time {head}", (8192, loss, name))
            for head in HEADS
            for loss in ("forward_kl", "jsd")
            for name in ("tokens", "tokens 1 GiB", gpu_times.CLUSTERED, gpu_times.OFFSETS, gpu_times.OFFSETS_CUDA, "vocab", "eager")
        ]
        (others,) = short["others"]
        assert [item[2] for item in others.items[::2]] == [
            *("liger", "liger triton", "liger kl_div", "trl", "fla", "torchtune", "compiled")
        ]
        assert {item[:2] for item in full["ours"][-1].items} == {
            (tokens, loss) for tokens in (2048, 4096, 8192, 16_384, 32_768) for loss in LOSSES
        }
        assert set(gpu_checks.SHORT) <= set(gpu_checks.SETTINGS)

    def test_only_keeps_the_items_whose_name_contains_it(self) -> None:
        found = gpu.chosen("short", ["ours", "rows"], "gemma3 8192 jsd tokens")
        assert list(found) == ["ours"]
        assert [part.items for part in found["ours"]] == [
            tuple(
                (8192, "jsd", name)
                for name in ("tokens", "tokens 1 GiB", gpu_times.CLUSTERED, gpu_times.OFFSETS, gpu_times.OFFSETS_CUDA)
            )
        ]
