"""Banned tokens, NaN and infinities in online distillation: what they do to each of the two losses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kdkernels as kd
from tests.support.cases import (
    Case,
    draw,
    parameters,
    running,
)
from tests.support.okd import (
    OF_STUDENT,
    OF_TEACHER,
    assert_as_plain,
    full,
    one_of_each,
    run,
)
from tests.support.oracle import Options


class TestSpecialValues:
    def banning(self, name: str = "forward_kl", dtype: torch.dtype = torch.float64) -> Case:
        """Tokens banned in the student, in the teacher and in both."""
        case = full(dtype, divergence=name)
        case = replace(case, student_softcap=None, teacher_softcap=None, labels=torch.tensor([7, -100, 20, 36, 7, 8]))
        assert case.student_bias is not None
        assert case.teacher_bias is not None
        case.student_bias[:5], case.teacher_bias[3:7] = -torch.inf, -torch.inf
        return case

    @pytest.mark.parametrize("variant", parameters(("native", "native-vocab", "reference-vocab", "triton", "triton-vocab")))
    @pytest.mark.parametrize("name", kd.divergences())
    def test_banned_tokens_add_nothing(self, name: str, variant: str) -> None:
        case = self.banning(name, torch.float32)
        with running(variant):
            assert_as_plain(case, 0.5)

    @one_of_each
    @pytest.mark.parametrize("model", ["student", "teacher"])
    def test_a_bad_token_is_nan_in_both_losses_and_no_other_is(self, model: str, variant: str) -> None:
        case = draw(options=Options("jsd"))
        with running(variant):
            right = run(case, reduction="none", teacher_alpha=1.0)
            getattr(case, f"{model}_hidden")[2, 3] = torch.nan
            found = run(case, reduction="none", teacher_alpha=1.0)
        others = [0, 1, 3, 4, 5]
        for name in ("student", "teacher", "student_hidden", "teacher_hidden"):
            assert found[name][2].isnan().all(), name
            torch.testing.assert_close(found[name][others], right[name][others], rtol=1e-6, atol=1e-8)
        for name in ("student_weight", "teacher_weight"):
            assert found[name].isnan().all(), name

    @one_of_each
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("model", ["student", "teacher"])
    def test_a_bad_entry_makes_nan(self, model: str, bad: float, variant: str) -> None:
        case = replace(full(), student_softcap=None, teacher_softcap=None)
        getattr(case, f"{model}_bias")[5] = bad
        with running(variant):
            for name, value in run(case).items():
                assert value.isnan().any(), name

    @one_of_each
    def test_a_loss_that_does_not_look_at_the_other_model_goes_on_when_that_breaks(self, variant: str) -> None:
        with running(variant):
            case = full(kd_weight=0.0)
            right = run(case)
            case.teacher_hidden[0] = torch.nan
            broken = run(case)
            for name in ("student", *OF_STUDENT):
                torch.testing.assert_close(broken[name], right[name], rtol=0, atol=0)
            assert broken["teacher"].isnan()
            case = full()
            right = run(case, teacher_alpha=0.0)
            case.student_hidden[0] = torch.nan
            broken = run(case, teacher_alpha=0.0)
            for name in ("teacher", *OF_TEACHER):
                torch.testing.assert_close(broken[name], right[name], rtol=0, atol=0)
            assert broken["student"].isnan()
