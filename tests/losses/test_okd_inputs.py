"""Bad arguments of ``linear_okd_loss`` are refused before any work, in words that name the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kdkernels as kd
from tests.support.refusals import CASE, LABELS, LINEAR, OPTIONS, forbid_work, refused


class TestBadInput:
    """Refused before any work, in words that name the argument."""

    @pytest.fixture(autouse=True)
    def nothing_is_computed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        forbid_work(monkeypatch)

    def online(self, **changed: Any) -> Any:
        arguments: dict[str, Any] = {
            "student_hidden": CASE.student_hidden,
            "student_head": CASE.student_weight,
            "teacher_hidden": CASE.teacher_hidden,
            "teacher_head": CASE.teacher_weight,
            "labels": None,
            "teacher_alpha": 1.0,
        }
        return kd.linear_okd_loss(**{**arguments, **changed})

    def test_the_good_input_would_work_and_its_teacher_may_require_grad(self, monkeypatch: pytest.MonkeyPatch) -> None:
        learns = {"teacher_hidden": CASE.teacher_hidden.clone().requires_grad_(), "labels": LABELS, "teacher_alpha": 0.5}
        with pytest.raises(AssertionError, match="work was done"):
            self.online(**learns)
        monkeypatch.undo()
        made = self.online(**learns)
        assert made.teacher.requires_grad
        assert torch.stack(list(made)).isfinite().all()

    @pytest.mark.parametrize(
        ("wrong", "error", "words"),
        [
            ({"teacher_alpha": 1.5}, ValueError, ("teacher_alpha", "[0, 1]", "1.5")),
            ({"teacher_alpha": -0.1}, ValueError, ("teacher_alpha", "[0, 1]", "-0.1")),
            ({"teacher_alpha": torch.nan}, ValueError, ("teacher_alpha", "[0, 1]", "nan")),
            ({"teacher_alpha": torch.inf}, ValueError, ("teacher_alpha", "[0, 1]", "inf")),
            ({"teacher_alpha": "half"}, TypeError, ("teacher_alpha", "[0, 1]", "str")),
            ({"teacher_alpha": True}, TypeError, ("teacher_alpha", "[0, 1]", "bool")),
            ({"teacher_alpha": None}, TypeError, ("teacher_alpha", "[0, 1]", "NoneType")),
            ({"teacher_alpha": torch.tensor(0.5)}, TypeError, ("teacher_alpha", "[0, 1]", "Tensor")),
            ({"teacher_alpha": 0.5}, ValueError, ("labels is None", "teacher_alpha=0.5", "cross-entropy")),
            ({"teacher_alpha": 0}, ValueError, ("labels is None", "teacher_alpha=0", "cross-entropy")),
            ({"t": 0.5}, TypeError, ("'t'",)),
        ],
    )
    def test_teacher_alpha_and_the_labels_it_needs(
        self, wrong: dict[str, Any], error: type[Exception], words: tuple[str, ...]
    ) -> None:
        with refused(error, *words):
            self.online(**wrong)

    @pytest.mark.parametrize(
        ("wrong", "error", "words"),
        [one for one in [*OPTIONS, *LINEAR] if "t" not in one[0] and "linear_okd_loss" not in one[2]],
    )
    def test_what_linear_kd_loss_refuses(self, wrong: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
        with refused(error, *words):
            self.online(**wrong)
