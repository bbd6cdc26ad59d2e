"""What distillation from k tokens costs: three products of the student, no more scratch than the budget, no wait for a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdkernels.engine import outcomes
from tests.support.cases import (
    DTYPES,
    InsideOperators,
    both_strategies,
    draw,
    every_divergence,
)
from tests.support.counting import STUDENT, US, N, Products, V
from tests.support.oracle import Options
from tests.support.topk import Kept, both_tails, full, keep


class TestCost:
    # A column of all tokens takes one float32 tile: this is four blocks of the vocabulary.
    BLOCKS = 16 * N * 4

    def count(self, learn: tuple[str, ...], kept: Kept | None = None, **more: Any) -> int:
        kept = keep(draw(tokens=(N,), vocab=V, dims=(STUDENT, 12)), 6, "bucket") if kept is None else kept
        leaves = {name: leaf.detach().requires_grad_(name in learn) for name, leaf in kept.learned().items()}
        with Products() as products:
            loss = kept.loss(leaves, **more).sum()
            if learn:
                loss.backward()
        return products.flops

    @both_tails
    @every_divergence
    @pytest.mark.parametrize("memory_budget", [None, 500, 1])
    def test_three_of_the_students_and_chunks_add_none(self, memory_budget: int | None, name: str, tail: str) -> None:
        kept = keep(replace(draw(tokens=(N,), vocab=V, dims=(STUDENT, 12)), options=Options(name)), 6, tail)
        options: dict[str, Any] = {"strategy": "tokens", "memory_budget": memory_budget, "return_metrics": False}
        assert self.count(("student_hidden", "student_weight"), kept, **options) == 3 * US
        assert self.count(("student_hidden",), kept, **options) == 2 * US
        assert self.count(("student_weight",), kept, **options) == 2 * US
        assert self.count((), kept, **options) == US

    @every_divergence
    def test_streaming_multiplies_once_more_for_every_divergence(self, name: str) -> None:
        kept = keep(replace(draw(tokens=(N,), vocab=V, dims=(STUDENT, 12)), options=Options(name)), 6, "bucket")
        options: dict[str, Any] = {"strategy": "vocab", "memory_budget": self.BLOCKS}
        assert self.count(("student_hidden", "student_weight"), kept, **options) == 4 * US
        assert self.count(("student_hidden",), kept, **options) == 3 * US
        assert self.count((), kept, **options) == US
        assert self.count(("student_hidden", "student_weight"), kept, strategy="vocab") == 3 * US

    def test_losses_per_token_are_computed_again_in_the_backward(self) -> None:
        assert self.count(("student_hidden", "student_weight"), reduction="none") == 4 * US

    @both_strategies
    @pytest.mark.parametrize("count", [0, 1, N // 2, N])
    def test_dropped_tokens_cost_nothing(self, count: int, strategy: str) -> None:
        kept = keep(draw(tokens=(N,), vocab=V, dims=(STUDENT, 12)), 6)
        labels = torch.full((N,), -100)
        labels[torch.randperm(N, generator=torch.Generator().manual_seed(0))[:count]] = 3
        for case in (replace(kept.case, labels=labels), replace(kept.case, token_weight=(labels == 3).float())):
            found = self.count(("student_hidden", "student_weight"), replace(kept, case=case), strategy=strategy)
            assert found == 3 * US * count // N

    @both_strategies
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("memory_budget", [200, 1000, 2000])
    def test_the_scratch_is_within_the_budget(
        self, memory_budget: int, dtype: torch.dtype, strategy: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken: list[int] = []
        borrowed = outcomes.borrowed

        def recording(block: int, tiles: Any, *rest: Any) -> Any:
            taken.append(sum(rows * columns * of.itemsize for (rows, columns), of in tiles))
            return borrowed(block, tiles, *rest)

        monkeypatch.setattr(outcomes, "borrowed", recording)
        full(dtype=dtype).run(strategy=strategy, memory_budget=memory_budget)
        least = 8 * (37 if strategy == "tokens" else 6)  # one token or one column: less there cannot be
        assert taken
        assert all(0 < size <= max(memory_budget, least) for size in taken)

    @both_strategies
    def test_nothing_as_large_as_all_logits_is_made(self, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Chunks of eight tokens of 24 or blocks of sixteen columns of 50, in pieces of one row."""
        monkeypatch.setattr(outcomes, "PIECE_BYTES", {"cpu": 1})
        made_of: list[tuple[int, ...]] = []

        class Shapes(InsideOperators):
            def after(self, name: str, made: Any) -> None:
                parts = made if isinstance(made, (tuple, list)) else (made,)
                made_of.extend(tuple(part.shape) for part in parts if isinstance(part, Tensor) and part.dtype != torch.uint8)

        kept = keep(draw(tokens=(N,), vocab=V, dims=(STUDENT, 12)), 6, "bucket")
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in kept.learned().items()}
        with Shapes():
            kept.loss(leaves, strategy=strategy, memory_budget=8 * V * 4)
        wide = {shape for shape in made_of if len(shape) == 2 and shape[1] > STUDENT and shape[0] not in (V, STUDENT)}
        assert wide
        assert max(rows * columns for rows, columns in wide) <= 8 * V

    def test_nobody_waits_for_the_device(self) -> None:
        """Sizes that depend on values make a GPU wait; the kept rows are the only such."""
        seen: list[str] = []

        class Names(InsideOperators):
            def before(self, name: str, args: tuple[Any, ...]) -> None:
                seen.append(name)

        kept = full("bucket")
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in kept.learned().items()}
        with Names():
            kept.loss(leaves, return_metrics=True)
        waiting = {"aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal", "aten::unique_dim", "aten::_unique2"}
        assert not waiting & set(seen)
        assert seen.count("aten::_local_scalar_dense") == 0
        assert seen.count("aten::nonzero_static") == 1
