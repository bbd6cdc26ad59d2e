"""Claims about how a step is cut, and that any cut of it gives the same loss and gradients."""

from __future__ import annotations

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.engine.cut import CUTS, Cut, Size, backend_of, column_bytes, logit_bytes
from kdkernels.engine.scratch import row_stride
from kdkernels.losses import operators as ops
from kdkernels.planning import devices
from kdkernels.planning.plan import choose
from tests.backends.test_backends import yardsticks
from tests.support.cases import assert_as_good_as_eager, draw, parameters, ratios, running
from tests.support.oracle import Options

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def sizes(device: str) -> list[Size]:
    return [
        Size(
            tokens=tokens,
            vocab=vocab,
            student_dim=8,
            teacher_dim=12,
            dtype=dtype,
            teacher_dtype=teacher_dtype,
            divergence="forward_kl",
            train_head=True,
            device=torch.device(device),
            budget=budget,
            learners=learners,
        )
        for tokens, vocab, dtype, teacher_dtype, budget, learners in itertools.product(
            (1, 7, 300), (1, 37, 1003), DTYPES, DTYPES, (1, 4000, 10**6), (1, 2)
        )
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_every_part_of_a_step_has_a_place_and_the_budget_bounds_it(strategy: str, device: str) -> None:
    for size in sizes(device):
        cut = CUTS[strategy](size)
        chunks, blocks = list(cut.chunk_slices()), list(cut.block_slices())
        assert (len(chunks), len(blocks)) == (cut.chunks, cut.blocks)
        for parts, whole in ((chunks, size.tokens), (blocks, size.vocab)):
            assert [0, *(part.stop for part in parts)] == [*(part.start for part in parts), whole]
        assert cut.whole_rows == (strategy == "tokens")
        assert cut.logits_bytes <= size.budget or 1 in (cut.rows, cut.columns)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_the_tiles_are_what_the_sizes_were_counted_from(strategy: str, device: str) -> None:
    """Beside them lie a gradient that is cast (in blocks), and the reference's temporaries."""
    for size in sizes(device):
        cut = CUTS[strategy](size)
        of = size.dtype, size.teacher_dtype, size.device, size.learners
        per_logit = (logit_bytes if strategy == "tokens" else column_bytes)(*of)
        held = sum(tile.shape[0] * row_stride(tile.shape[1], size.device) * tile.dtype.itemsize for tile in cut.tiles)
        counted = cut.rows * row_stride(cut.columns, size.device) * per_logit
        assert cut.logits_bytes == counted >= held
        if strategy == "tokens" and not backend_of(*of[2:3], *of[:2]).temporaries:
            assert counted == held


def both(size: Size) -> Cut:
    """Seven chunks of three rows, in five blocks of columns."""
    return Cut(size, 3, 8, False)


IN_BOTH = mock.patch.dict(ops.CUTS, {"vocab": both})


@pytest.mark.parametrize("variant", parameters(("native", "reference", "triton")))
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_rows_in_blocks_of_columns_are_as_good_as_eager(dtype: torch.dtype, name: str, variant: str) -> None:
    cases = [draw(seed, tokens=(19,), vocab=37, dtype=dtype, options=Options(name)) for seed in range(4)]
    with running(variant), IN_BOTH:
        found = [case.run(strategy="vocab") for case in cases]
    exact, eager = yardsticks(*([case.plain(of) for case in cases] for of in (torch.float64, dtype)), 1.0, dtype)
    assert_as_good_as_eager({name: ratios(found, eager, exact)})


@pytest.mark.parametrize("variant", parameters(("native", "reference", "triton")))
def test_two_learners_and_dropped_rows_are_cut_both_ways_too(variant: str) -> None:
    case = draw(tokens=(19,), vocab=37, options=Options("jsd", ce_weight=0.5))
    leaves = [leaf.clone().requires_grad_() for leaf in (case.student_hidden, case.student_weight, case.teacher_hidden)]
    labels = torch.arange(19).where(torch.arange(19) % 4 != 0, -100)

    def step(strategy: str) -> list[Tensor]:
        losses = kd.linear_okd_loss(
            leaves[0], leaves[1], leaves[2], case.teacher_weight, labels, divergence="jsd", ce_weight=0.5, strategy=strategy
        )
        return [loss.detach() for loss in losses] + list(torch.autograd.grad(losses.student + losses.teacher, leaves))

    with running(variant), IN_BOTH:
        for one, other in zip(step("vocab"), step("tokens"), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_target_of_k_tokens_is_cut_both_ways_too() -> None:
    case = draw(tokens=(19,), vocab=37)
    leaves = [leaf.clone().requires_grad_() for leaf in (case.student_hidden, case.student_weight)]
    ids = torch.arange(19)[:, None] + torch.arange(4)
    log_probs = torch.full((19, 4), 0.2).log()

    def step(strategy: str) -> list[Tensor]:
        loss = kd.linear_topk_kd_loss(leaves[0], leaves[1], ids, log_probs, divergence="jsd", strategy=strategy)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    with IN_BOTH:
        for one, other in zip(step("vocab"), step("tokens"), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_auto_goes_by_16_bit_logits_where_they_are_made_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few bytes that they make the difference: with offsets all tokens are one chunk, with float32 logits they are three."""
    monkeypatch.setenv("KDKERNELS_LOGITS", "offsets")
    size = Size(
        tokens=40,
        vocab=151_936,
        student_dim=896,
        teacher_dim=3584,
        dtype=torch.bfloat16,
        teacher_dtype=torch.bfloat16,
        divergence="forward_kl",
        train_head=True,
        device=torch.device("cuda"),
        budget=40 * 151_936 * 4,
        architecture="sm_90",
    )
    on = devices.device("H100")
    assert choose("auto", size, on) == "tokens"
    for change in (
        {"known": True},
        {"shared": True, "widest": size.vocab},
        {"alone": True, "teacher_dim": 0},
        {"no_offsets": True},
    ):
        assert choose("auto", replace(size, **change), on) == "vocab", change
