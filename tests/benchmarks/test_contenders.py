"""Every contender computes its loss, and the yardstick is the products that no loss can do without."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import compare, contenders, measure
from benchmarks.cases import IGNORED, LOSSES, Case, Head, half_masked, problem
from benchmarks.contenders import CONTENDERS, CROSS_ENTROPY, NotOfferedError
from benchmarks.exact import errors
from benchmarks.measure import stepped

LIBRARY = {"liger": "liger-kernel", "trl": "trl"}
HEAD = Head("any", "student", "teacher", 97, 101, 8, 12)
CASES = [Case("heads", HEAD, 20, "fp32", loss=loss, masked=masked) for loss, masked in compare.EVERY]


# torch's compiler looks at the gradient of whatever it is given
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", compare.NAMES)
def test_every_loss_is_that_of_float64(name: str, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> None:
    library = LIBRARY.get(name.split()[0])
    if library is not None and measure.version(library) is None:
        pytest.skip(f"{library} is not installed")
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
        found = errors(value, given, right, of_cross_entropy=name in CROSS_ENTROPY)
        assert max(found.values()) < tolerance, (case, found)
    expected = set(LOSSES) - {"taid"} if name in CROSS_ENTROPY else {"taid"} if library else set()
    assert set(lacking) == expected


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
