"""The bounds of the checks at the sizes of models (benchmarks/gpu_scale.py), on a CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_device, gpu_scale
from tests.support.cases import draw
from tests.support.needs import needs_triton


def test_the_bound_of_long_rows_knows_what_cancels() -> None:
    """Of JSD as plain formulas in float32 and in float64, whose largest entries cancel; a neighbour's entry is not within it."""

    def dx_of(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        log_q, q, p = x.log_softmax(1), x.softmax(1), z.softmax(1)
        slope = 0.5 * q * (log_q - ((p + q) / 2).log())
        return slope - q * slope.sum(1, keepdim=True)

    x, z = (torch.randn(2, 64, 50_257, generator=torch.Generator().manual_seed(3)) * 3).unbind()
    exact = dx_of(x.double(), z.double())
    sides = x.log_softmax(1), z.log_softmax(1)
    allowed = gpu_scale.may_differ(exact, *sides, "jsd") + exact.abs() * 2 * torch.finfo(torch.float32).eps
    assert ((dx_of(x, z) - exact).abs() <= allowed).all()
    assert ((exact.roll(1, 1) - exact).abs() > allowed).any(1).all()


@needs_triton
def test_stored_offsets_are_held_to_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.interpreter import as_on_a_gpu

    monkeypatch.setattr(gpu_scale, "TILE", 32)  # of the interpreter's blocks
    case = draw(tokens=(6,), vocab=150, dims=(16, 24), dtype=torch.bfloat16)
    for hidden, head in ((case.student_hidden, case.student_weight), (case.teacher_hidden, case.teacher_weight)):
        hidden[:, 0], head[[5, 149], 0] = gpu_scale.BANNING
    sides: list[tuple[torch.Tensor, ...]] = []
    with as_on_a_gpu(), gpu_device.offset_logits(kept=sides) as started, torch.no_grad():
        case.loss()
    assert started == [6]
    inputs = (case.student_hidden, case.student_weight), (case.teacher_hidden, case.teacher_weight)
    for learns, side, of in zip((True, False), sides, inputs, strict=True):
        assert gpu_scale.stored_offsets(*side, *of, learns=learns) <= 1.0
        for at, wrong in enumerate((1.01, 1.01, 1.001)):
            spoiled = [part.clone() for part in side]
            spoiled[at][3, 2] *= wrong
            assert gpu_scale.stored_offsets(*spoiled, *of, learns=learns) > 1.0
        assert (gpu_scale.stored_offsets(*side, *of, learns=True) == torch.inf) != learns, "a student's banned codes are to be told"
        for at, place, wrong in ((2, (3, 2), -side[2][3, 2]), (0, (3, 7), -torch.inf)):
            spoiled = [part.clone() for part in side]
            spoiled[at][place] = wrong
            assert gpu_scale.stored_offsets(*spoiled, *of, learns=learns) == torch.inf
        spoiled = [part.clone() for part in side]
        spoiled[0][:, 40] = torch.nan
        assert not gpu_scale.stored_offsets(*spoiled, *of, learns=learns) <= 1.0
