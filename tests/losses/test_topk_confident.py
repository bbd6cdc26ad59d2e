"""A confident teacher's k tokens: where their probabilities sum to 1 in float32 the rest of the vocabulary is not nothing, and the
loss stays a divergence, by value and at the end of training."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from tests.support.cases import Case, assert_same, both_strategies, every_divergence
from tests.support.oracle import Options
from tests.support.topk import INF, default_tail, divergence, keep


class TestConfidentTeachers:
    """Where the k tokens' probabilities sum to 1 in float32, the rest is not nothing."""

    V, K = 1000, 64

    def teacher(self) -> Tensor:
        """Logits (1, V) in float64: one token far above all others, which are alike."""
        z = torch.zeros(1, self.V, dtype=torch.float64)
        z[0, 7] = 25.0
        return z

    def student(self) -> Tensor:
        x = torch.full((1, self.V), -9.2)
        x[0, 7] = -1.0
        return x

    def known(self, z: Tensor, rest: bool) -> dict[str, Tensor]:
        """What is kept of the teacher in float32; without the rest's log-probability the k sum to 1 to the last bit."""
        whole = z.log_softmax(-1)
        logprobs, ids = whole.topk(self.K)
        more = {"topk_rest": whole.scatter(-1, ids, -INF).logsumexp(-1).float()} if rest else {}
        return {
            "topk_ids": ids,
            "topk_logprobs": z.float().log_softmax(-1).gather(-1, ids) if not rest else logprobs.float(),
            **more,
        }

    def loss(self, x: Tensor, known: dict[str, Tensor], name: str, **more: Any) -> Any:
        return kd.linear_topk_kd_loss(x, torch.eye(self.V), **known, divergence=name, tail="bucket", **more)

    @every_divergence
    @both_strategies
    @pytest.mark.parametrize("t", [0.4, 1.0])
    def test_with_the_rest_known_the_loss_is_that_of_the_whole_teacher(self, t: float, strategy: str, name: str) -> None:
        """Tokens outside are alike in both models, so that nothing is lost by taking them together."""
        x = self.student().requires_grad_()
        found = self.loss(x, self.known(self.teacher(), rest=True), name, t=t, strategy=strategy, memory_budget=2000)
        y = self.student().double().requires_grad_()
        right = kd.kd_loss(y, self.teacher(), divergence=name, t=t)
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(found, x)[0].double(), torch.autograd.grad(right, y)[0], rtol=1e-4, atol=1e-6
        )
        if t == 1.0 and name in ("reverse_kl", "skew_reverse_kl"):
            assert round(found.item(), 3) == {"reverse_kl": 3.375, "skew_reverse_kl": 0.323}[name]

    @every_divergence
    def test_bare_log_probabilities_make_no_divergence_negative(self, name: str) -> None:
        known, x = self.known(self.teacher(), rest=False), self.student()
        assert known["topk_logprobs"].double().exp().sum() >= 1, "the rest would have mass of its own"
        assert self.loss(x, known, name) > 0
        for share in (1e-30, 1e-9, 1e-5, 0.3, 0.999):  # what the student gives the others
            x = torch.full((1, self.V), math.log(share / (self.V - 1)))
            x[0, 7] = math.log1p(-share)
            assert self.loss(x, known, name) >= -1e-6

    @every_divergence
    def test_as_the_rest_goes_to_nothing_the_loss_does_not_jump(self, name: str) -> None:
        ids, x = torch.tensor([[7, 3]]), self.student()

        def loss(rest: float) -> float:
            logprobs = torch.tensor([[math.log1p(-rest - 0.25), math.log(0.25)]], dtype=torch.float64)
            return float(self.loss(x, {"topk_ids": ids, "topk_logprobs": logprobs}, name))

        masses = [10.0 ** (-place / 4) for place in range(8, 60)] + [0.0]
        found = [loss(mass) for mass in masses]
        assert found[0] > 0
        # A quarter of a decade of a rest that the student gives less than a quarter of its mass.
        assert max(abs(one - next_one) for one, next_one in itertools.pairwise(found)) < 0.25 * math.log(10) / 4
        assert abs(loss(1e-8) - loss(0.0)) < 1e-6

    @every_divergence
    @pytest.mark.parametrize("rest", [True, False])
    def test_trained_to_the_end_the_student_is_its_teacher(self, rest: bool, name: str) -> None:
        known = self.known(self.teacher(), rest)
        x = self.student().requires_grad_()
        optimizer = torch.optim.Adam([x], lr=0.1)
        before = kd.kd_loss(self.student().double(), self.teacher(), divergence=name)
        for _ in range(400):
            optimizer.zero_grad()
            self.loss(x, known, name).backward()
            optimizer.step()
        assert x.detach().softmax(-1)[0, 7] > 0.999
        assert kd.kd_loss(x.detach().double(), self.teacher(), divergence=name) < 0.02 * before

    @pytest.mark.parametrize("name", ["reverse_kl", "skew_reverse_kl", "jsd", "total_variation"])
    def test_gradients_of_peaked_rows_are_those_of_the_formulas(self, name: str) -> None:
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(20, 4000, generator=generator, dtype=torch.float64) * 14
        x = (z + torch.randn(20, 4000, generator=generator) * 6).float()
        case = Case(x, torch.eye(4000), z, torch.eye(4000, dtype=torch.float64), options=Options(name))
        kept = keep(case, 64, "bucket", rest=True)
        assert (kept.log_probs.double().exp().sum(-1) >= 1).any(), "no row of which the rest is lost in float32"
        leaves = x.clone().requires_grad_()
        loss = kd.linear_topk_kd_loss(
            leaves, torch.eye(4000), kept.ids, kept.log_probs, topk_rest=kept.rest, divergence=name, reduction="sum"
        )
        found = torch.autograd.grad(loss, leaves)[0].double()
        exact = x.double().requires_grad_()
        assert kept.rest is not None
        rows = [
            divergence(*row, "bucket", case.options, rest)
            for *row, rest in zip(exact, kept.ids, kept.log_probs, kept.rest, strict=True)
        ]  # type: ignore[arg-type]
        right = torch.autograd.grad(torch.stack(rows).sum(), exact)[0]
        error = (found - right).norm(dim=1) / right.norm(dim=1).clamp(min=1e-6)
        assert error.max() < 1e-3

    def test_the_default_tail_is_one_that_makes_a_divergence(self) -> None:
        x, ids, logprobs = torch.tensor([[0.6, 0.4]]).log(), torch.tensor([[0]]), torch.tensor([[0.9]]).log()
        assert [default_tail(name) for name in ("reverse_kl", "skew_reverse_kl")] == ["bucket", "bucket"]
        for name in kd.divergences():
            found = kd.linear_topk_kd_loss(x, torch.eye(2), ids, logprobs, divergence=name)
            tail = default_tail(name)
            assert_same([found], [kd.linear_topk_kd_loss(x, torch.eye(2), ids, logprobs, divergence=name, tail=tail)])
            assert found > 0
        full = kd.kd_loss(x, torch.tensor([[0.9, 0.1]]).log(), divergence="reverse_kl")
        torch.testing.assert_close(kd.linear_topk_kd_loss(x, torch.eye(2), ids, logprobs, divergence="reverse_kl"), full)
        assert round(full.item(), 3) == 0.311
        given = kd.linear_topk_kd_loss(x, torch.eye(2), ids, logprobs, topk_rest=torch.tensor([0.1]).log())
        assert_same(
            [given], [kd.linear_topk_kd_loss(x, torch.eye(2), ids, logprobs, tail="bucket", topk_rest=torch.tensor([0.1]).log())]
        )

    @pytest.mark.parametrize("name", ["forward_kl", "skew_forward_kl", "jsd", "total_variation"])
    def test_renormalised_divergences_are_least_at_their_teacher(self, name: str) -> None:
        """As the student's mass moves from two tokens to a third, which is not listed."""
        ids, logprobs = torch.tensor([[0, 1]]), torch.tensor([[0.7, 0.3]]).log()
        found = []
        for outside in (1e-9, 0.01, 0.1, 0.5, 0.9):
            x = torch.tensor([[0.7 * (1 - outside), 0.3 * (1 - outside), outside]]).log()
            found.append(kd.linear_topk_kd_loss(x, torch.eye(3), ids, logprobs, divergence=name, tail="renormalize").item())
        assert found == sorted(found)
        assert abs(found[0]) < 1e-6
        u, p, q = 0.5, torch.tensor([0.7, 0.3, 0.0]).double(), torch.tensor([0.35, 0.15, 0.5]).double()
        left_out = {"total_variation": u / 2, "jsd": 0.5 * u * math.log(2)}.get(name, 0.0)
        m = {"jsd": (p + q) / 2, "skew_forward_kl": 0.1 * p + 0.9 * q}.get(name, q)
        kl = {"total_variation": (p - q).abs().sum() / 2, "jsd": (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum() / 2}
        whole = kl.get(name, torch.xlogy(p, p / m).sum())
        assert found[3] == pytest.approx(float(whole) - left_out, rel=1e-5)
