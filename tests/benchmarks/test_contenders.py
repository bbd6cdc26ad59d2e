"""Every contender computes its loss, and the yardstick is the products that no loss can do without."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import compare, contenders, measure, peers
from benchmarks.cases import IGNORED, LOSSES, Case, Head, Problem, half_masked, problem
from benchmarks.contenders import CONTENDERS, CROSS_ENTROPY
from benchmarks.exact import errors
from benchmarks.measure import stepped
from benchmarks.peers import OFFERS, NotOfferedError
from tests.support import ROOT

LIBRARY = {"liger": "liger-kernel", "trl": "trl", "fla": "fla-core", "torchtune": "torchtune"}
# What the contenders that do not have every loss have.
OFFERED = {
    **{name: {"forward_kl", "reverse_kl", "jsd"} for name in ("liger", "liger compiled", "liger triton", "trl")},
    **{name: {"forward_kl"} for name in ("liger kl_div", "fla")},
    "torchtune": {"forward_kl", "reverse_kl"},
    "taid published": {"taid"},
}
HEAD = Head("any", "student", "teacher", 97, 101, 8, 12)
CASES = [Case("heads", HEAD, 20, "fp32", loss=loss, masked=masked) for loss, masked in compare.EVERY]


def needs(name: str) -> None:
    library = LIBRARY.get(name.split()[0])
    if library is not None and measure.version(library) is None:
        pytest.skip(f"{library} is not installed")
    if name in contenders.TRITON:
        pytest.importorskip("triton")
    if name == "fla":
        with warnings.catch_warnings():  # of a missing GPU, and of what its other modules would like to have
            warnings.simplefilter("ignore")
            importlib.import_module("fla.modules.fused_kl_div")


# torch's compiler looks at the gradient of whatever it is given
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", [*compare.NAMES, "liger triton"])
def test_every_loss_is_that_of_float64(name: str, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> None:
    """Those of Triton in its interpreter."""
    needs(name)
    if name == "liger compiled":  # its compiler takes longer than all else here
        monkeypatch.setattr(torch, "compile", lambda function: function)
    lacking, given = [], problem(CASES[0])
    # A logit is a sum of D terms, each rounded; its absolute error is the relative one of a probability.
    logits = given.teacher_hidden @ given.teacher_head.T
    tolerance = 2 * HEAD.teacher_dim * torch.finfo(torch.float32).eps * float(logits.abs().max())
    for case, right in compare.truth(CASES).items():
        given = problem(case)
        try:
            value = CONTENDERS[name](case.loss)(given)
        except NotOfferedError:
            lacking.append(case.loss)
            continue
        value.backward()
        found = errors(value, given, right, of_cross_entropy=(name, case.loss) in CROSS_ENTROPY)
        assert max(found.values()) < tolerance, (case, found)
    assert set(lacking) == set(LOSSES) - OFFERED.get(name, set(LOSSES))
    assert contenders.ONLY.get(name) in (OFFERED.get(name, set()) | {None})


def test_half_of_the_tokens_are_masked() -> None:
    for tokens in (2, 16, 64, 128, 512):
        labels = half_masked(tokens)
        assert int((labels == IGNORED).sum()) == tokens // 2
        assert labels[0] == IGNORED
        assert labels[-1] != IGNORED


@pytest.mark.parametrize(("loss", "of_teacher"), [("forward_kl", 1), ("okd", 2)])
@pytest.mark.parametrize(("masked", "tokens"), [(False, 20), (True, 10)])
def test_the_bare_products_are_those_of_the_loss(loss: str, of_teacher: int, masked: bool, tokens: int) -> None:
    """x, z, dH and dW once each, however many blocks they come in: 3 Us + Ut operations, and Ut for dH of a teacher that learns;
    those of the tokens that count. Counted by torch."""
    case = Case("time", HEAD, 20, "fp32", loss=loss, masked=masked)
    given = problem(case)
    right = 2 * tokens * HEAD.vocab * (3 * HEAD.student_dim + of_teacher * HEAD.teacher_dim)
    for block in (7, 20, 100):
        with FlopCounterMode(display=False) as counter:
            contenders.products(given, block)()
        assert counter.get_total_flops() == right
    with FlopCounterMode(display=False) as counter:
        stepped(contenders.loss_of(case), given)()
    assert counter.get_total_flops() in (0, right), "0 where the counter does not look into the operator"


def test_an_online_step_makes_the_teachers_gradient_and_every_step_anew() -> None:
    case = Case("time", HEAD, 32, "fp32", loss="okd")
    given = problem(case)
    step, grads = stepped(contenders.loss_of(case), given), []
    for _ in range(2):
        step()
        made = [leaf.grad for leaf in (given.hidden, given.head, given.teacher_hidden)]
        grads.append([grad.clone() for grad in made if grad is not None])
    assert len(grads[0]) == 3
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert sum(grad.nbytes for grad in grads[0]) == case.returned_bytes
    assert given.teacher_head.grad is None
    assert not problem(CASES[0]).teacher_hidden.requires_grad


class TestOffers:
    """What the table of the contenders says of other libraries, tried out on them. Student and teacher have a head each, and biases
    where the library has some."""

    @pytest.mark.parametrize("name", OFFERS)
    def test_the_source_that_was_read_is_the_one_that_is_installed(self, name: str) -> None:
        library = LIBRARY.get(name.split()[0])
        if library is not None:
            read, pinned = OFFERS[name].source, (ROOT / "pyproject.toml").read_text()
            assert read.startswith(f"{library} ")
            assert f'"{read.replace(" ", "==")}"' in pinned, "read its source again, and then change what it offers"

    @pytest.mark.parametrize("name", sorted(set(LIBRARY) | {"liger triton", "liger kl_div"}))
    def test_a_teacher_with_a_larger_vocabulary(self, name: str) -> None:
        needs(name)
        given = problem(CASES[0])
        cut, x, z = given.vocab, given.hidden @ given.head.T, given.teacher_hidden @ given.teacher_head.T
        lp, lq = z.log_softmax(-1), x.log_softmax(-1)
        padded = torch.nn.functional.pad(x, (0, z.shape[1] - cut)).log_softmax(-1)
        right = (z[:, :cut].softmax(-1) * (z[:, :cut].log_softmax(-1) - lq)).sum(-1).mean()
        expected = {
            "cut": right,
            "cut, not renormalised": (lp.exp() * lp)[:, :cut].sum(-1).mean() - (lp[:, :cut].exp() * lq).sum(-1).mean(),
            "student padded with logits of 0": (lp.exp() * (lp - padded)).sum(-1).mean(),
        }
        whole = Uncut(given.hidden, given.head, given.teacher_hidden, given.teacher_head)
        said = OFFERS[name].larger_teacher
        if said == "an error":
            with pytest.raises(RuntimeError, match="must match"):
                CONTENDERS[name]("forward_kl")(whole)
            return
        value = CONTENDERS[name]("forward_kl")(whole)
        if said == "wrong rows are read":
            assert not any(torch.isclose(value, other, rtol=1e-2) for other in expected.values())
        else:
            torch.testing.assert_close(value, expected[said], rtol=1e-4, atol=0)

    @pytest.mark.parametrize("side", ["student", "teacher"])
    # The authors' code of TAID masks such entries before the formula that the contender is.
    @pytest.mark.parametrize("name", sorted(OFFERS.keys() - {"taid published"}))
    def test_a_banned_entry(self, name: str, side: str, fresh_compiler: None) -> None:
        """By an entry of the head before a hidden state of 1, since not all of them have biases; so only the loss is looked at, as
        0 times -inf makes the gradient NaN whatever the loss."""
        needs(name)
        given = problem(CASES[0])
        banned = {"student": given.head, "teacher": given.teacher_head}[side].detach().clone()
        banned[3, 0] = -torch.inf
        for hidden in (given.hidden, given.teacher_hidden):
            hidden.detach()[:, 0] = 1
        heads = (banned, given.teacher_head) if side == "student" else (given.head, banned)
        given = Problem(given.hidden, heads[0].requires_grad_(), given.teacher_hidden, heads[1])
        finite = {
            "0": ("student", "teacher"),
            "0; NaN in the gradient of reverse KL": ("student", "teacher"),
            "0 in the target, inf or NaN in the student": ("teacher",),
            "inf or NaN": (),
        }[OFFERS[name].banned]
        assert bool(CONTENDERS[name]("forward_kl")(given).isfinite()) == (side in finite)

    def test_the_gradient_of_torchtunes_reverse_kl_at_a_banned_entry(self) -> None:
        needs("torchtune")
        x, z = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(0)).unbind()
        x[0, 3] = -torch.inf
        losses = peers._file_of("torchtune", "modules/loss/kd_losses.py")
        for name, right in (("ForwardKLLoss", True), ("ReverseKLLoss", False)):
            logits = x.clone().requires_grad_()
            value = getattr(losses, name)()(logits, z, torch.zeros(1, dtype=torch.int64))
            value.backward()
            assert logits.grad is not None
            assert (bool(value.isfinite()), bool(logits.grad.isfinite().all())) == (True, right)


class Uncut(Problem):
    """Whose teacher keeps the rows past the student's vocabulary."""

    @property
    def cut_teacher_head(self) -> torch.Tensor:
        return self.teacher_head
