"""TAID's controller: the authors' recursion, on the device, the same on every rank."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kdkernels as kd
from tests.support import ROOT
from tests.support.cases import draw


class ByHand:
    """The recursion in plain numbers, as METHODS describes the authors' code."""

    def __init__(self, t_start: float, t_end: float, alpha: float, beta: float) -> None:
        self.t_start, self.t_end, self.alpha, self.beta = t_start, t_end, alpha, beta
        self.t, self.momentum, self.previous = t_start, 0.0, math.nan

    def update(self, loss: float, progress: float) -> float:
        if math.isnan(self.previous):
            self.previous = loss
            return self.t
        change = (self.previous - loss) / (self.previous + 1e-15)
        self.momentum = self.beta * self.momentum + (1 - self.beta) * change
        step = self.alpha / (1 + math.exp(-self.momentum)) * (1 - self.t)
        linear = self.t_start + (self.t_end - self.t_start) * progress
        self.t = min(self.t_end, max(linear, self.t + step))
        self.previous = loss
        return self.t


def losses(steps: int, seed: int = 0) -> list[float]:
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(seed))
    return [3.0 * math.exp(-step / steps) + 0.2 * noise[step].item() for step in range(steps)]


@pytest.mark.parametrize(
    ("t_start", "t_end", "alpha", "beta"),
    [(0.4, 1.0, 5e-4, 0.99), (0.2, 1.0, 0.05, 0.9), (0.0, 0.8, 0.5, 0.0), (0.4, 0.4, 0.1, 0.5), (0.3, 0.9, 2.0, 0.1)],
)
def test_it_follows_the_recursion(t_start: float, t_end: float, alpha: float, beta: float) -> None:
    schedule, by_hand = kd.TAIDSchedule(t_start, t_end, alpha, beta), ByHand(t_start, t_end, alpha, beta)
    for step, loss in enumerate(losses(100)):
        progress = step / 200
        t = schedule.update(torch.tensor(loss) if step % 2 else loss, progress)
        assert t.item() == pytest.approx(by_hand.update(loss, progress), abs=2e-6)
        assert schedule.t.item() == t.item()


def test_the_adaptive_part_moves_faster_than_the_line() -> None:
    schedule = kd.TAIDSchedule(alpha=0.05)
    for loss in losses(20):
        schedule.update(loss, 0.0)
    assert 0.5 < schedule.t.item() < 1.0


def test_the_first_update_leaves_t_where_it_is() -> None:
    for adaptive_progress in (0.0, 0.9):
        schedule = kd.TAIDSchedule(t_start=0.3)
        assert schedule.update(2.0, adaptive_progress).item() == pytest.approx(0.3)


def test_without_adaptation_t_is_linear() -> None:
    schedule = kd.TAIDSchedule(t_start=0.2, t_end=0.8, adaptive=False)
    for progress in (0.0, 0.25, 0.5, 1.0):
        assert schedule.update(1.0, progress).item() == pytest.approx(0.2 + 0.6 * progress)


def test_t_never_leaves_its_range_and_never_falls() -> None:
    schedule, before = kd.TAIDSchedule(t_start=0.1, t_end=0.7, alpha=1.0), 0.1
    for step, loss in enumerate(losses(50)):
        t = schedule.update(loss * (-1) ** step, step / 50).item()
        assert before - 1e-7 <= t <= 0.7 + 1e-7
        before = t


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_loss_that_is_no_number_teaches_nothing(bad: float, at: int) -> None:
    """As if that step had not been: it stays neither in the momentum nor as the loss to compare with."""
    schedule, without = kd.TAIDSchedule(alpha=0.1), kd.TAIDSchedule(alpha=0.1)
    for step, loss in enumerate(losses(10)):
        if step == at:
            before = schedule.t.item()
            assert schedule.update(bad, 0.0).item() == before
        schedule.update(loss, 0.0)
        without.update(loss, 0.0)
    assert schedule.t.item() == without.t.item()


def test_state_dict_continues_where_it_stopped() -> None:
    one, steps = kd.TAIDSchedule(alpha=0.1), losses(20)
    for step in range(10):
        one.update(steps[step], step / 20)
    other = kd.TAIDSchedule(alpha=0.1)
    other.load_state_dict(one.state_dict())
    for step in range(10, 20):
        assert one.update(steps[step], step / 20).item() == other.update(steps[step], step / 20).item()
    assert set(one.state_dict()) == {"t", "momentum", "previous"}


def test_updates_wait_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, loss = kd.TAIDSchedule(), torch.tensor(2.0)

    def waits(self: Tensor, *_: object) -> None:
        raise AssertionError("a value was fetched from the device")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
            patch.setattr(Tensor, name, waits)
        for progress in (0.0, 0.5):
            schedule.update(loss, progress)
    assert schedule.t.item() > 0.4
    on_meta = kd.TAIDSchedule().to("meta")
    assert on_meta.update(torch.tensor(1.0, device="meta"), 0.5).device.type == "meta"


def test_t_drives_the_loss_and_nothing_remembers_the_graph() -> None:
    case, schedule = draw(), kd.TAIDSchedule(t_start=0.3)
    weight = case.student_weight.clone().requires_grad_()
    loss = kd.linear_kd_loss(case.student_hidden, weight, case.teacher_hidden, case.teacher_weight, t=schedule.t)
    expected = kd.linear_kd_loss(case.student_hidden, weight, case.teacher_hidden, case.teacher_weight, t=0.3)
    torch.testing.assert_close(loss, expected)
    schedule.update(loss, 0.1)
    schedule.update(loss, 0.9)
    assert not any(buffer.requires_grad for buffer in schedule.buffers())
    loss.backward()  # t has moved on; the gradients are of the loss that was computed
    torch.testing.assert_close(weight.grad, torch.autograd.grad(expected, [weight])[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_moving_t_before_the_backward_is_never_silently_wrong(reduction: str) -> None:
    case, schedule = draw(), kd.TAIDSchedule(t_start=0.3)
    weight = case.student_weight.clone().requires_grad_()
    inputs = (case.student_hidden, weight, case.teacher_hidden, case.teacher_weight)
    loss = kd.linear_kd_loss(*inputs, t=schedule.t, reduction=reduction).sum()
    (expected,) = torch.autograd.grad(kd.linear_kd_loss(*inputs, t=0.3, reduction=reduction).sum(), [weight])
    schedule.update(loss.detach(), 0.0)
    schedule.update(loss.detach(), 0.9)
    try:
        (found,) = torch.autograd.grad(loss, [weight])
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017 (either outcome is right)
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"t_start": -0.1}, ValueError, r"0 <= t_start <= t_end <= 1.*t_start=-0.1"),
        ({"t_start": 0.9, "t_end": 0.5}, ValueError, r"t_start=0.9, t_end=0.5"),
        ({"t_end": 1.5}, ValueError, r"t_end=1.5"),
        ({"t_start": math.nan}, ValueError, r"t_start=nan"),
        ({"alpha": -1.0}, ValueError, r"alpha.*-1.0"),
        ({"alpha": math.inf}, ValueError, r"alpha.*inf"),
        ({"beta": 1.0}, ValueError, r"beta.*\[0, 1\).*1.0"),
        ({"beta": -0.5}, ValueError, r"beta.*-0.5"),
        ({"t_start": "0.4"}, TypeError, r"t_start is a number, got str"),
        ({"beta": True}, TypeError, r"beta is a number, got bool"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, float], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        kd.TAIDSchedule(**arguments)


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan, "half", None, True, torch.tensor(0.5)])
def test_bad_progress_is_refused(progress: object) -> None:
    with pytest.raises((ValueError, TypeError), match="progress"):
        kd.TAIDSchedule().update(1.0, progress)  # type: ignore[arg-type]


def test_a_loss_per_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss.*\(3,\)"):
        kd.TAIDSchedule().update(torch.ones(3), 0.5)


def test_two_ranks_with_different_losses_keep_one_t(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import torch, torch.distributed as dist
            import kdkernels as kd

            rank, path = int(sys.argv[1]), sys.argv[2]
            dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
            schedule = kd.TAIDSchedule(alpha=0.5, beta=0.5)
            for step in range(6):
                loss = torch.tensor(3.0 - 0.3 * step + rank * (1 + step % 3))
                schedule.update(loss, step / 20)
                assert loss.item() == torch.tensor(3.0 - 0.3 * step + rank * (1 + step % 3)).item()  # all_reduce works on a copy
            print(repr(schedule.t.item()))
            dist.destroy_process_group()
            """
        )
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    found = [float(rank.communicate(timeout=120)[0]) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    alone = ByHand(0.4, 1.0, 0.5, 0.5)
    for step in range(6):
        alone.update(3.0 - 0.3 * step + (1 + step % 3) / 2, step / 20)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(alone.t, abs=1e-5)


def test_a_number_of_numpy_is_a_number() -> None:
    ours, numpys = kd.TAIDSchedule(), kd.TAIDSchedule()
    for loss in (2.0, 1.5, 1.25):
        ours.update(loss, 0.1)
        numpys.update(np.float32(loss), 0.1)
    assert numpys.t == ours.t


def test_a_plan_takes_counts_of_numpy() -> None:
    assert kd.plan(np.int64(8), 100, 4, 4) == kd.plan(8, 100, 4, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_that_models_are_made_in_is_not_the_schedules(dtype: torch.dtype) -> None:
    """Lightning makes the modules of a bf16-true run under such a default; a cast state dict may be assigned instead of copied."""
    torch.set_default_dtype(dtype)
    try:
        made = kd.TAIDSchedule()
    finally:
        torch.set_default_dtype(torch.float32)
    assigned = kd.TAIDSchedule()
    assigned.load_state_dict({name: state.to(dtype) for name, state in kd.TAIDSchedule().state_dict().items()}, assign=True)
    for schedule in (made, assigned):
        schedule.update(3.0, 0.0)
        schedule.update(2.0, 0.0)
        assert {state.dtype for state in schedule.state_dict().values()} == {torch.float32}


def test_arguments_of_numpy_are_numbers() -> None:
    numpys = kd.TAIDSchedule(np.float32(0.5), np.int64(1), np.float64(1e-3), np.float16(0.5), np.bool_(False))
    assert repr(numpys) == repr(kd.TAIDSchedule(0.5, 1.0, 1e-3, 0.5, False))
    assert numpys.update(np.float32(1), np.float32(0.5)) == 0.75


@pytest.mark.parametrize("cast", [torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double])
def test_a_cast_of_the_model_leaves_the_schedule_its_digits(cast: Any) -> None:
    """As Lightning does to a module that holds it; in bfloat16 t would stand still."""
    losses = torch.linspace(3.0, 1.0, 400)
    plain, held = kd.TAIDSchedule(alpha=5e-3), kd.TAIDSchedule(alpha=5e-3)
    model = cast(torch.nn.ModuleList([torch.nn.Linear(2, 2), held]))
    assert model[0].weight.dtype != torch.float32
    for at, loss in enumerate(losses):
        plain.update(loss, at / 4000)
        held.update(loss, at / 4000)
    assert held.t.dtype == torch.float32
    assert held.t > 0.5
    assert torch.equal(held.t, plain.t)
    assert held.to("meta").t.device.type == "meta"
