"""The class of Liger's name beside Liger itself and the float64 oracle: the same where Liger is right, right where it is not.

Liger runs with compiled=False: what it computes is the same, and nothing has to be compiled for tensors of a few kilobytes.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdkernels.compat.liger import LigerFusedLinearJSDLoss
from tests.support import oracle
from tests.support.cases import Case, InsideOperators, assert_as_good_as_eager, draw, error, ratios, root_mean_square
from tests.support.oracle import Options

Theirs = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss

BETAS = {0.0: ("forward_kl", None), 0.2: ("jsd", 0.2), 0.5: ("jsd", 0.5), 1.0: ("reverse_kl", None)}


def problem(seed: int = 0, *, beta: float = 0.5, biases: bool = True, tokens: tuple[int, ...] = (7,), **more: Any) -> Case:
    """Hidden states, heads, and labels of which some do not count; the options as the oracle has them."""
    options = {"temperature": 1.0, "kd_weight": 0.5, "ce_weight": 0.5, "ignore_index": -100}
    given = {name: more.pop(name) for name in options if name in more}
    case = draw(seed, tokens=tokens, **more)
    generator = torch.Generator().manual_seed(seed + 100)
    vocab, dtype = case.student_weight.shape[0], case.student_weight.dtype
    labels = torch.randint(1, vocab, tokens, generator=generator)
    labels.view(-1)[2::5] = given.get("ignore_index", -100)
    name, parameter = BETAS[beta]
    if biases:
        student_bias, teacher_bias = torch.randn(2, vocab, generator=generator).to(dtype)
        case = replace(case, student_bias=student_bias, teacher_bias=teacher_bias)
    return replace(case, labels=labels, options=Options(name, parameter, square_temperature=False, **{**options, **given}))


def beta_of(case: Case) -> float:
    return next(beta for beta, found in BETAS.items() if found == (case.options.divergence, case.options.parameter))


def loss_of(cls: Any, case: Case, **more: Any) -> Any:
    """The loss function with the options of the case."""
    options = case.options
    return cls(
        weight_hard_loss=options.ce_weight,
        weight_soft_loss=options.kd_weight,
        beta=beta_of(case),
        ignore_index=options.ignore_index,
        temperature=options.temperature,
        **{"compiled": False, **more},
    )


def arguments(case: Case, leaves: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "student_input": leaves["student_hidden"],
        "student_weight": leaves["student_weight"],
        "teacher_input": case.teacher_hidden,
        "teacher_weight": case.teacher_weight,
        "true_labels": case.labels,
        "student_bias": leaves.get("student_bias"),
        "teacher_bias": case.teacher_bias,
    }


def run(cls: Any, case: Case, **more: Any) -> dict[str, Tensor]:
    """Loss and gradients."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in case.learned().items()}
    loss = loss_of(cls, case, **more)(**arguments(case, leaves))
    return {"loss": loss.detach(), **dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))}


def relative(found: dict[str, Tensor], exact: dict[str, Tensor], name: str) -> float:
    return error([found], [exact], name) / root_mean_square([exact[name]])


def test_constructor_and_call_are_ligers() -> None:
    for ours, theirs in ((LigerFusedLinearJSDLoss, Theirs), (LigerFusedLinearJSDLoss.forward, Theirs.forward)):
        assert [(parameter.name, parameter.default) for parameter in inspect.signature(ours).parameters.values()] == [
            (parameter.name, parameter.default) for parameter in inspect.signature(theirs).parameters.values()
        ]
    ours, theirs = LigerFusedLinearJSDLoss(0.1, 0.9, 0.2, -1, 2.0, False, 7, True), Theirs(0.1, 0.9, 0.2, -1, 2.0, False, 7, True)
    names = [name for name in vars(theirs) if not name.startswith("_") and name != "training"]
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert len(names) == 8


# Each of the two is held against the oracle in the same measure, so what passes for both is the same.
@pytest.mark.parametrize("cls", [LigerFusedLinearJSDLoss, Theirs], ids=["ours", "theirs"])
class TestWhereLigerIsRight:
    def compare(self, cls: Any, settings: dict[Any, dict[str, Any]]) -> None:
        compared = {}
        for setting, options in settings.items():
            cases = [problem(seed, **options) for seed in range(4)]
            compared[setting] = ratios(
                *([one(case) for case in cases] for one in (lambda case: run(cls, case), lambda case: case.plain(torch.float32))),
                [case.plain() for case in cases],
            )
        assert_as_good_as_eager(compared)

    def test_values_and_gradients_for_every_beta_and_temperature(self, cls: Any) -> None:
        self.compare(cls, {(beta, T): {"beta": beta, "temperature": T, "tokens": (40,)} for beta in BETAS for T in (0.7, 1.0, 3.0)})

    def test_weights_of_the_two_losses(self, cls: Any) -> None:
        weights = ((0.0, 1.0), (1.0, 0.0), (0.3, 2.0))
        self.compare(cls, {pair: {"ce_weight": pair[0], "kd_weight": pair[1], "tokens": (40,)} for pair in weights})

    def test_without_biases_another_ignore_index_and_more_dimensions(self, cls: Any) -> None:
        self.compare(
            cls,
            {
                "ignore_index": {"ignore_index": 0, "tokens": (40,), "biases": False},
                "(B, S, D)": {"tokens": (4, 10), "biases": False},
            },
        )

    @pytest.mark.parametrize("hard", [0.3, 0.0])
    @pytest.mark.parametrize("beta", BETAS)
    def test_both_terms_are_returned_without_their_weights(self, cls: Any, beta: float, hard: float) -> None:
        case = problem(beta=beta, ce_weight=hard, kd_weight=0.7, temperature=2.0, tokens=(4, 10))
        leaves = {name: leaf.double().requires_grad_() for name, leaf in case.learned().items()}
        double = replace(
            case,
            **{
                name: None if getattr(case, name) is None else getattr(case, name).double()
                for name in ("teacher_hidden", "teacher_weight", "teacher_bias")
            },
        )
        found = loss_of(cls, case, return_soft_hard_loss=True)(**arguments(double, leaves))
        single = torch.finfo(torch.float32).eps  # Liger sums up in float32
        plain = {
            part: replace(case, options=replace(case.options, kd_weight=kd, ce_weight=ce)).plain()["loss"]
            for part, kd, ce in (("soft", 1.0, 0.0), ("hard", 0.0, 1.0))
        }
        for value, exact in zip(found, (0.7 * plain["soft"] + hard * plain["hard"], plain["soft"], plain["hard"]), strict=True):
            assert abs(value.double() - exact) <= 2 * single * exact

    def test_the_gradient_is_of_the_loss_alone(self, cls: Any) -> None:
        """Whatever is added of the other two: Liger gives them no gradient, and so do we."""
        case = problem()
        expected = run(cls, case)
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in case.learned().items()}
        loss, soft, hard = loss_of(cls, case, return_soft_hard_loss=True)(**arguments(case, leaves))
        for name, grad in zip(leaves, torch.autograd.grad(loss + soft + hard, list(leaves.values())), strict=True):
            assert torch.equal(grad, expected[name]), name

    def test_a_second_backward_gives_the_same_again(self, cls: Any) -> None:
        case = problem()
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in case.learned().items()}
        loss = loss_of(cls, case)(**arguments(case, leaves)) * 3
        first, second = (torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other)

    def test_where_no_label_counts_all_is_zero(self, cls: Any) -> None:
        case = problem()
        assert case.labels is not None
        for value in run(cls, replace(case, labels=torch.full_like(case.labels, -100))).values():
            assert torch.equal(value, torch.zeros_like(value))

    def test_labels_need_not_be_rows_of_the_heads_where_only_the_soft_loss_counts(self, cls: Any) -> None:
        case = problem(ce_weight=0.0, ignore_index=0)
        assert case.labels is not None
        expected = run(cls, case)
        found = run(cls, replace(case, labels=torch.where(case.labels == 0, 0, 10**6 - case.labels)))
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_a_teacher_that_requires_grad_gets_none(self, cls: Any) -> None:
        case = problem()
        teacher = {name: getattr(case, name).clone().requires_grad_() for name in ("teacher_hidden", "teacher_weight")}
        run(cls, replace(case, **teacher))
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in case.learned().items()}
        loss_of(cls, case)(**arguments(replace(case, **teacher), leaves)).backward()
        assert all(leaf.grad is None for leaf in teacher.values())

    def test_attributes_may_be_set_later(self, cls: Any) -> None:
        case = problem(beta=0.2, temperature=2.0, kd_weight=0.9, ce_weight=0.1)
        later = cls(compiled=False)
        later.beta, later.temperature, later.weight_soft_loss, later.weight_hard_loss = 0.2, 2.0, 0.9, 0.1
        assert torch.equal(later(**arguments(case, case.learned())), loss_of(cls, case)(**arguments(case, case.learned())))

    def test_autocast_decides_what_the_products_run_in(self, cls: Any) -> None:
        case = problem(tokens=(40,), spread=3.0)
        exact, single = case.plain(), run(cls, case)
        with torch.autocast("cpu", torch.bfloat16):
            found = run(cls, case)
        rounding = torch.finfo(torch.bfloat16).eps
        for name in exact:
            if name != "losses":
                assert found[name].dtype == single[name].dtype == torch.float32
                assert relative(single, exact, name) < rounding / 16 < rounding / 8 < 8 * rounding
                assert 0 < relative(found, exact, name) < 8 * rounding


class TestWhereLigerIsNot:
    @pytest.mark.parametrize("beta", BETAS)
    def test_sixteen_bits_cost_half_a_rounding(self, beta: float) -> None:
        """Liger takes the log-softmax in bfloat16, and adds up the head's gradient in it, chunk by chunk."""
        case = self.in_sixteen_bits(beta)
        exact, ours, theirs = case.plain(), run(LigerFusedLinearJSDLoss, case), run(Theirs, case, chunk_size=8)
        for name in ("student_hidden", "student_weight"):
            right, wrong = relative(ours, exact, name), relative(theirs, exact, name)
            assert right <= torch.finfo(torch.bfloat16).eps / 2, (name, right, wrong)
            assert wrong >= 2 * right, (name, right, wrong)

    def test_the_divergence_of_a_student_close_to_its_teacher_is_right_in_sixteen_bits(self) -> None:
        """The end of a training run: log-probabilities that agree to two digits, which is all that bfloat16 has of them."""
        case = self.in_sixteen_bits(0.5, near=0.1, dims=(8, 8))
        exact, ours, theirs = case.plain(), run(LigerFusedLinearJSDLoss, case), run(Theirs, case, chunk_size=8)
        assert relative(ours, exact, "loss") <= torch.finfo(torch.bfloat16).eps / 2
        assert relative(theirs, exact, "loss") >= 0.1

    def in_sixteen_bits(self, beta: float, **more: Any) -> Case:
        given = {"ce_weight": 0.0, "tokens": (256,), "vocab": 101, "spread": 1.0, "dtype": torch.bfloat16, "biases": False}
        return problem(beta=beta, **given, **more)

    @pytest.mark.parametrize("beta", BETAS)
    @pytest.mark.parametrize("banned", ["student", "teacher", "both"])
    def test_a_banned_token_adds_nothing(self, beta: float, banned: str) -> None:
        case = problem(beta=beta, ce_weight=0.0)
        for name in ("student", "teacher"):
            if banned in (name, "both"):
                getattr(case, f"{name}_bias")[0] = -torch.inf
        exact, eager, ours = case.plain(), case.plain(torch.float32), run(LigerFusedLinearJSDLoss, case)
        for name in ours:
            assert relative(ours, exact, name) <= 2 * relative(eager, exact, name) + 8 * torch.finfo(torch.float32).eps, name
        assert not all(value.isfinite().all() for value in run(Theirs, case).values())

    def test_what_stands_in_a_row_without_a_label_does_not_matter(self) -> None:
        case = problem()
        assert case.labels is not None
        expected = run(LigerFusedLinearJSDLoss, case)
        ignored = case.labels == -100
        case = replace(
            case,
            student_hidden=case.student_hidden.masked_fill(ignored[:, None], torch.nan),
            teacher_hidden=case.teacher_hidden.masked_fill(ignored[:, None], torch.inf),
        )
        found, theirs = run(LigerFusedLinearJSDLoss, case), run(Theirs, case)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert torch.equal(found["student_hidden"][ignored], torch.zeros_like(found["student_hidden"][ignored]))
        assert theirs["student_weight"].isnan().all()

    def test_a_frozen_head_costs_no_product(self) -> None:
        class HeadSized(InsideOperators):
            """How many products are as large as the student's head."""

            count = 0

            def after(self, name: str, made: Any) -> None:
                if name in ("aten::mm", "aten::addmm"):
                    self.count += tuple(made.shape) == (37, 8)

        def products(cls: Any, *, frozen: bool) -> int:
            case = problem(biases=False)
            leaves = {"student_hidden": case.student_hidden.clone().requires_grad_(), "student_weight": case.student_weight.clone()}
            leaves["student_weight"].requires_grad_(not frozen)
            with HeadSized() as seen:
                loss_of(cls, case)(**arguments(case, leaves)).backward()
            return seen.count

        assert [products(LigerFusedLinearJSDLoss, frozen=frozen) for frozen in (True, False)] == [0, 1]
        assert products(Theirs, frozen=True) == products(Theirs, frozen=False) > 0

    @pytest.mark.parametrize("beta", BETAS)
    def test_a_teacher_padded_further_is_cut_to_the_students_rows(self, beta: float) -> None:
        """Qwen2.5: 151,936 rows and 152,064. Liger lets the student have logits of 0 there, which is most of its probability."""
        case = problem(beta=beta, near=0.1, dims=(8, 8), ce_weight=0.0)
        assert case.teacher_bias is not None
        padding = torch.zeros(11, 8)  # as rows that were never trained
        padded = replace(
            case,
            teacher_weight=torch.cat([case.teacher_weight, padding]),
            teacher_bias=torch.cat([case.teacher_bias, torch.full((11,), -40.0)]),  # and that no text ever called for
        )
        exact, ours, theirs = case.plain(), run(LigerFusedLinearJSDLoss, padded), run(Theirs, padded)
        for name in ours:
            assert relative(ours, exact, name) <= 16 * torch.finfo(torch.float32).eps, name
        assert relative(theirs, exact, "loss") > 1e-3

    def test_float64_stays_float64(self) -> None:
        case = problem(dtype=torch.float64)
        exact, ours, theirs = case.plain(), run(LigerFusedLinearJSDLoss, case), run(Theirs, case)
        assert ours["loss"].dtype == torch.float64
        assert relative(ours, exact, "loss") <= 16 * torch.finfo(torch.float64).eps
        assert theirs["loss"].dtype == torch.float32


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"beta": 1.5}, ValueError, r"beta is a number in \[0, 1\].*got 1.5"),
            ({"beta": -0.1}, ValueError, r"beta is a number in \[0, 1\].*got -0.1"),
            ({"beta": "jsd"}, TypeError, r"beta is a number in \[0, 1\].*got str"),
            ({"temperature": 0.0}, ValueError, "temperature is a positive number, got 0.0"),
            ({"temperature": -1.0}, ValueError, "temperature is a positive number, got -1.0"),
            ({"weight_hard_loss": -0.5}, ValueError, "weight_hard_loss is a number of at least 0, got -0.5"),
            ({"weight_soft_loss": None}, TypeError, "weight_soft_loss is a number of at least 0, got NoneType"),
            ({"ignore_index": 1.0}, TypeError, "ignore_index is an integer, got float"),
        ],
    )
    def test_the_constructor_names_the_argument(self, options: dict[str, Any], error: Any, message: str) -> None:
        with pytest.raises(error, match=message):
            LigerFusedLinearJSDLoss(**options)

    @pytest.mark.parametrize(
        ("name", "value", "error", "message"),
        [
            ("student_input", torch.zeros(7, 9), ValueError, r"student_input has shape \(7, 9\).*must be D = 8"),
            ("student_input", torch.zeros(7, 8, dtype=torch.int64), TypeError, "student_input is torch.int64"),
            ("teacher_input", torch.zeros(6, 12), ValueError, r"teacher_input \(6, 12\) must agree in all dimensions"),
            ("teacher_input", None, TypeError, "teacher_input is a tensor, got NoneType"),
            ("student_weight", torch.zeros(8), ValueError, r"student_weight is \(V, D\).*got shape \(8,\)"),
            ("teacher_weight", torch.zeros(0, 12), ValueError, r"teacher_weight is \(V, D\).*got shape \(0, 12\)"),
            ("teacher_weight", torch.zeros(36, 12), ValueError, "teacher_weight has 36 rows, student_weight 37"),
            ("student_bias", torch.zeros(36), ValueError, r"student_bias is \(37,\).*got \(36,\)"),
            ("true_labels", torch.zeros(1, 7, dtype=torch.int64), ValueError, r"true_labels \(1, 7\)"),
            ("true_labels", torch.zeros(7), TypeError, "true_labels is torch.float32"),
            ("true_labels", torch.full((7,), 37), ValueError, "37"),
        ],
    )
    def test_the_call_names_the_argument(self, name: str, value: Any, error: Any, message: str) -> None:
        case = problem()
        with pytest.raises(error, match=message):
            LigerFusedLinearJSDLoss()(**{**arguments(case, case.learned()), "teacher_bias": None, name: value})


def test_liger_need_not_be_installed() -> None:
    program = (
        "import sys; sys.modules['liger_kernel'] = None\n"
        "import torch; from kdkernels.compat.liger import LigerFusedLinearJSDLoss\n"
        "print(LigerFusedLinearJSDLoss()(torch.ones(1, 2), torch.eye(2), torch.ones(1, 2), torch.eye(2), torch.tensor([1])).item())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert abs(float(done.stdout) - 0.5 * oracle.cross_entropy(torch.ones(1, 2), torch.tensor([1])).item()) < 1e-6
