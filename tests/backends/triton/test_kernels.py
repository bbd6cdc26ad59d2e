"""The kernels over many tiles and splits, in Triton's interpreter.

That every divergence, dtype and head is right is in test_backends.py; here is what takes more than one tile to go wrong.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kdkernels import backends
from kdkernels.backends import reference
from kdkernels.backends.columns import STATS_COLUMNS
from kdkernels.backends.merge import sums_of_one_sweep
from kdkernels.divergences import resolve
from tests.support.cases import draw, dressed
from tests.support.kernels import AT, DIMS, EPS, SPLITS, TOKENS, VOCAB, assert_close, large, of_logits, run, step_of, sweeps_of
from tests.support.oracle import Options

pytest.importorskip("triton", reason="Triton is not installed")
from kdkernels.backends.triton import autotune, vocabulary
from kdkernels.backends.triton.blocks import Matrix
from tests.support.interpreter import as_on_a_gpu


class TestTilesAndSplits:
    @pytest.fixture
    def splits(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How many partial results were merged."""
        seen: list[int] = []
        merged = vocabulary.merged
        monkeypatch.setattr(vocabulary, "merged", lambda parts, weigh: seen.append(len(parts)) or merged(parts, weigh))
        return seen

    @pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
    def test_however_the_vocabulary_is_split_the_results_are_the_same(self, name: str, splits: list[int]) -> None:
        case = large(name)
        with backends.use("reference"):
            right = run(case)
        for programs, count in SPLITS.items():
            with as_on_a_gpu(programs=programs):
                found = run(case)
            assert_close(found, right)
            assert splits[-1] == count

    @pytest.mark.parametrize("name", ["reverse_kl", "total_variation"])
    def test_two_runs_agree_bit_for_bit(self, name: str) -> None:
        with as_on_a_gpu(programs=5):
            for one, other in zip(*(run(large(name), return_metrics=True).values() for _ in range(2)), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)

    def test_metrics_over_splits(self) -> None:
        case = large("forward_kl")
        with backends.use("reference"):
            right = run(case, return_metrics=True)
        for programs in (1, 16):
            with as_on_a_gpu(programs=programs):
                assert_close(run(case, return_metrics=True), right)

    @pytest.mark.parametrize("tile", [(16, 16, 16), (32, 64, 32), (64, 256, 64)])
    def test_every_size_of_tile(self, tile: tuple[int, int, int]) -> None:
        with backends.use("reference"):
            right = run(large())
        with as_on_a_gpu(blocks=tile, programs=16):
            assert_close(run(large()), right)

    @pytest.mark.parametrize("vocab", [1, 5, 31, 32, 33])
    def test_a_vocabulary_of_about_a_tile(self, vocab: int) -> None:
        case = replace(dressed(draw(tokens=(3,), vocab=vocab)), options=Options("jsd", ce_weight=0.5))
        with backends.use("reference"):
            right = run(case, return_metrics=True)
        with as_on_a_gpu(programs=16):
            assert_close(run(case, return_metrics=True), right)

    @pytest.mark.parametrize("kd_weight", [0.0, 1.0])
    def test_labels_in_every_tile_and_at_its_edges(self, kd_weight: float) -> None:
        labels = torch.tensor([*range(30, 34), *range(62, 66), *range(0, 150, 5), 149, 79])  # a block ends after 80 columns
        case = replace(
            draw(tokens=(len(labels),), vocab=VOCAB, dims=DIMS), labels=labels, options=Options(kd_weight=kd_weight, ce_weight=1.0)
        )
        with backends.use("reference"):
            right = run(case)
        with as_on_a_gpu(programs=16):
            assert_close(run(case), right)

    @pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
    def test_tiles_and_splits_that_are_banned_whole(self, name: str) -> None:
        case = replace(large(name), labels=None, options=Options(name, t=0.5))
        assert case.student_bias is not None
        assert case.teacher_bias is not None
        case = replace(case, student_softcap=None, teacher_softcap=None)
        case.student_bias[:64], case.teacher_bias[:40], case.teacher_bias[120:] = -torch.inf, -torch.inf, -torch.inf
        with backends.use("reference"):
            right = run(case, return_metrics=True)
        assert all(value.isfinite().all() for value in right.values())
        for programs in (1, 16):
            with as_on_a_gpu(programs=programs):
                assert_close(run(case, return_metrics=True), right)
                assert_close(run(case), {part: value for part, value in right.items() if part in ("loss", *case.learned())})

    @pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "total_variation"])
    @pytest.mark.parametrize("model", ["student", "teacher"])
    def test_a_bad_entry_shows_whatever_its_tile(self, model: str, name: str) -> None:
        one_sweep = resolve(name).one_sweep
        for bad, column in ((torch.nan, 10), (torch.nan, 149), (torch.inf, 70)):
            bias = torch.zeros(VOCAB)
            bias[column] = bad
            step = step_of(replace(draw(tokens=(6,), vocab=VOCAB), **{f"{model}_bias": bias}), name)
            with as_on_a_gpu(programs=16):
                stats = sweeps_of(step).statistics(one_sweep, False)
                sums = sums_of_one_sweep(stats, resolve(name)) if one_sweep else sweeps_of(step).sums(stats)
                dx = torch.cat([tile.clone() for *_, tile in sweeps_of(step).gradients(stats, sums)], 1)
            assert sums[:, :2].isnan().all()
            assert dx.isnan().all()

    @pytest.mark.parametrize("model", ["student_hidden", "teacher_hidden"])
    def test_a_bad_token_is_nan_and_no_other(self, model: str) -> None:
        case = draw(tokens=(TOKENS,), vocab=VOCAB, options=Options("jsd"))
        others = torch.arange(TOKENS) != 2
        with as_on_a_gpu(programs=16):
            right = case.loss(reduction="none", strategy="vocab")
            getattr(case, model)[2, 3] = torch.nan
            found = case.loss(reduction="none", strategy="vocab")
        assert found[2].isnan()
        torch.testing.assert_close(found[others], right[others], rtol=0, atol=0)

    @pytest.mark.parametrize("programs", SPLITS)
    def test_of_equal_largest_logits_the_first_wins(self, programs: int) -> None:
        x, z = (torch.randn(2, 8, VOCAB, generator=torch.Generator().manual_seed(0)) * 3).round()
        for row, columns in enumerate([(3, 5), (31, 32), (0, 149), (64, 96, 128), (63, 64), (31, 63), (149,), (16, 140)]):
            x[row, list(columns)], z[row, [(column + 7) % VOCAB for column in columns]] = 50.0, 60.0
        case = of_logits(x, z)
        with as_on_a_gpu(programs=programs):
            found = sweeps_of(step_of(case, "jsd", metrics=True)).statistics("", False)
        assert found[:, AT["argmax_x"]].tolist() == x.argmax(1).tolist()
        assert found[:, AT["argmax_z"]].tolist() == z.argmax(1).tolist()

    @pytest.mark.parametrize("weigh", ["target", "student"])
    def test_statistics_are_those_of_the_reference_where_the_largest_entries_grow_late(self, weigh: str) -> None:
        x, z = torch.randn(2, 20, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
        x[3, 60:] += 300.0  # by more than any exponential holds
        z[4, 100:] += 300.0
        x[5, :20] += 300.0
        labels = torch.arange(20) * 7
        case = replace(of_logits(x, z, labels=labels), options=Options(t=0.7, temperature=2.0, ce_weight=1.0))
        head = [1.0, 0.0, 1.0, 0.0]
        t = torch.tensor(0.7)
        right = reference.block_stats(x, z, None, None, labels, t, 2.0, head, weigh, True, True)
        for programs in SPLITS:
            with as_on_a_gpu(programs=programs):
                found = sweeps_of(step_of(case, "jsd", metrics=True)).statistics(weigh, True)
            for column, name in enumerate(STATS_COLUMNS):
                tolerance = VOCAB * EPS * right[:, column].abs().max().item()
                torch.testing.assert_close(found[:, column].float(), right[:, column], rtol=0, atol=tolerance, msg=name)

    @pytest.mark.parametrize("factor", [2, 4])
    def test_any_candidate_of_a_search_gives_the_same(self, factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """The blocks that run may differ from those that the splits were made for."""
        kernels = set()

        def chosen(kernel: Any, matrix: Matrix, *_: Any) -> Matrix:
            kernels.add(kernel.fn.__name__)
            return replace(matrix, block_n=matrix.block_n * factor, block_d=matrix.block_d * 2)

        with as_on_a_gpu(programs=5):
            right = run(large())
            monkeypatch.setattr(autotune, "chosen", chosen)
            assert_close(run(large()), right)
        assert kernels == {"statistics_kernel", "sums_kernel", "gradient_kernel"}


def test_a_teacher_that_nobody_looks_at_is_not_handed_to_the_kernels() -> None:
    case = replace(draw(), labels=torch.arange(6), options=Options(kd_weight=0.0, ce_weight=1.0))
    for metrics in (False, True):  # which are about the teacher
        with as_on_a_gpu():
            *_, (student, teacher) = sweeps_of(step_of(case, "jsd", metrics=metrics))._operands(Matrix(16, 32, 16, 4, 1))
        assert student is not None
        assert (teacher is None) == (not metrics)
