"""The distillation losses that are timed side by side: ours, plain PyTorch, and the libraries that offer the same loss.

Every contender is a function of one ``Problem`` that returns the mean loss over its kept tokens as a 0-dim tensor with a gradient
to the student's hidden states and head. Those of other libraries are in peers.py, with their conventions. The yardstick of all is
``products``. The teacher's rows past the student's vocabulary (Qwen2.5 pads its larger models further) are cut off by a view for
those that have no option for it.

Masked tokens: ours and the published TAID take all rows and the labels (or a mask). Plain PyTorch gets hidden[kept], as one writes
it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

import kdkernels as kd
from benchmarks import peers
from benchmarks.cases import GIB, IGNORED, ONLINE, Case, Problem
from benchmarks.gpu_device import cluster_rows, offset_logits
from benchmarks.peers import Loss, NotOfferedError
from kdkernels.backends.dtypes import product_dtype
from kdkernels.backends.products import block_rows, cut_for_logits

STRATEGIES = ("tokens", "vocab", "auto")
# On a GPU, where a default scratch is larger; and what has to be asked for.
BUDGETED, CLUSTERED, OFFSETS = "tokens 1 GiB", "tokens, cluster rows", "tokens, 16-bit logits"
OFFSETS_CUDA = "tokens, 16-bit logits, CUDA C++"
TAID_T = 0.4  # the teacher's share in the target at the start of one of the published runs
BLOCK = 512  # tokens per block of the bare products, on a CPU
CHECKPOINTED_TOKENS = 256  # per chunk


def bare_logits(hidden: Tensor, head: Tensor, out: Tensor) -> None:
    """The first rows of ``out`` = hidden headᵀ, as fast as the library does it: by a block of the head at a time where that is
    faster, or a yardstick for few tokens would be longer than a whole loss."""
    width = block_rows(head.shape[1], head.device) if cut_for_logits(head.dtype, head.device) else len(head)
    for begin in range(0, len(head), width):
        torch.mm(hidden, head[begin : begin + width].t(), out=out[: len(hidden), begin : begin + width])


def products(given: Problem, block: int = BLOCK, dtype: torch.dtype | None = None) -> Callable[[], None]:
    """The four bare products x, z, dH and dW (3 Us + Ut operations) of the kept tokens, in blocks of ``block`` of them; and a fifth
    for the dH of a teacher that learns too.

    They are what no loss with these gradients can do without. Logits stand in for their gradients: the values are as random. dH and
    dW are new tensors, as a gradient is. The logits of a block are new ones too on a GPU, whose allocator hands out the same memory
    again; on a CPU, where the first touch of memory costs time, they are made here. dtype: what to multiply in, if not in what is
    fastest here.
    """
    dtype = dtype or product_dtype(given.head.dtype, given.head.device)
    hidden, teacher_hidden = (part.detach().to(dtype).contiguous() for part in given.kept)
    head, teacher_head = (part.detach().to(dtype) for part in (given.head, given.cut_teacher_head))
    online = given.teacher_hidden.requires_grad

    def logits() -> tuple[Tensor, Tensor]:
        shape = min(block, len(hidden)), given.vocab
        return hidden.new_empty(shape), hidden.new_empty(shape)

    made = logits() if hidden.device.type == "cpu" else None

    def run() -> None:
        hidden_grad, head_grad = torch.empty_like(hidden), torch.empty_like(head)
        teacher_grad = torch.empty_like(teacher_hidden) if online else None
        x, z = made or logits()
        for begin in range(0, len(hidden), block):
            rows = hidden[begin : begin + block]
            here = slice(begin, begin + len(rows))
            bare_logits(rows, head, x)
            bare_logits(teacher_hidden[here], teacher_head, z)
            torch.mm(x[: len(rows)], head, out=hidden_grad[here])
            torch.addmm(head_grad, x[: len(rows)].t(), rows, beta=float(begin > 0), out=head_grad)
            if teacher_grad is not None:
                torch.mm(z[: len(rows)], teacher_head, out=teacher_grad[here])

    return run


def ours(loss: str, strategy: Any = "auto", memory_budget: int | None = None, softcap: float | None = None, **options: Any) -> Loss:
    """softcap: of both heads. options: more of ``kd.linear_kd_loss``."""
    options |= {"strategy": strategy, "memory_budget": memory_budget, "ignore_index": IGNORED}
    options["divergence"] = "forward_kl" if loss in ("taid", ONLINE) else loss

    def arguments(given: Problem) -> tuple[Any, ...]:
        head, teacher_head = kd.LMHead(given.head, softcap=softcap), kd.LMHead(given.teacher_head, softcap=softcap)
        return given.hidden, head, given.teacher_hidden, teacher_head, given.labels

    def run(given: Problem) -> Tensor:
        t = TAID_T if loss == "taid" else 1.0
        value: Tensor = kd.linear_kd_loss(*arguments(given), t=t, vocab_size=given.vocab, **options)
        return value

    def both(given: Problem) -> Tensor:
        losses = kd.linear_okd_loss(*arguments(given), vocab_size=given.vocab, **options)
        return losses.student + losses.teacher

    return both if loss == ONLINE else run


def _asking(for_it: Callable[[], AbstractContextManager[list[int]]], loss: Loss) -> Loss:
    """for_it: yields the rows that it took. Raises LookupError where there were none."""

    def run(given: Problem) -> Tensor:
        with for_it() as started:
            value = loss(given)
        if not started:
            raise LookupError("KDKERNELS_ROWS or KDKERNELS_LOGITS was set, and what it asks for takes no rows here")
        return value

    return run


def _forward_kl(lq: Tensor, lp: Tensor) -> Tensor:
    return kl_div(lq, lp, reduction="sum", log_target=True)


def _reverse_kl(lq: Tensor, lp: Tensor) -> Tensor:
    return kl_div(lp, lq, reduction="sum", log_target=True)


def _jsd(lq: Tensor, lp: Tensor) -> Tensor:
    lm = torch.logaddexp(lp, lq) - math.log(2.0)
    return 0.5 * (kl_div(lm, lp, reduction="sum", log_target=True) + kl_div(lm, lq, reduction="sum", log_target=True))


# Sums over the tokens, from the log-probabilities of student and target.
_EAGER = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd, "taid": _forward_kl}
Formula = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _from_hidden(loss: str) -> Formula:
    """The loss as one writes it, in the dtype of the hidden states throughout: faster and smaller than with float32 logits, which
    are let go as soon as there are log-probabilities."""
    formula = _EAGER[loss]

    def run(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
        return formula((hidden @ head.t()).log_softmax(-1), (teacher_hidden @ teacher_head.t()).log_softmax(-1))

    def taid(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
        x = hidden @ head.t()
        lp = torch.lerp(x.detach(), teacher_hidden @ teacher_head.t(), TAID_T).log_softmax(-1)
        lq = x.log_softmax(-1)
        del x
        return formula(lq, lp)

    return taid if loss == "taid" else run


def _mean(formula: Formula, given: Problem) -> Tensor:
    hidden, teacher_hidden = given.kept
    return formula(hidden, given.head, teacher_hidden, given.cut_teacher_head) / len(hidden)


def _eager(loss: str) -> Loss:
    formula = _from_hidden(loss)
    return lambda given: _mean(formula, given)


def _compiled(loss: str) -> Loss:
    torch._dynamo.reset()
    # with the interpreter there is nothing to be fast for, and compiling takes longer than all else
    backend = "eager" if os.environ.get("TRITON_INTERPRET") == "1" else "inductor"
    formula = torch.compile(_from_hidden(loss), dynamic=False, backend=backend)
    return lambda given: _mean(formula, given)


def _checkpointed(loss: str) -> Loss:
    """Chunks of tokens, whose logits are thrown away and made again in the backward."""
    formula = _from_hidden(loss)

    def run(given: Problem) -> Tensor:
        hidden, teacher_hidden = given.kept
        sums: list[Tensor] = [
            checkpoint(formula, rows, given.head, teacher_rows, given.cut_teacher_head, use_reentrant=False)
            for rows, teacher_rows in zip(hidden.split(CHECKPOINTED_TOKENS), teacher_hidden.split(CHECKPOINTED_TOKENS), strict=True)
        ]
        return torch.stack(sums).sum() / len(hidden)

    return run


def _published_taid(loss: str) -> Loss:
    """TAID as its authors' code computes it (SakanaAI/TAID, src/distil_losses): float32 probabilities of all tokens, and the
    cross-entropy with them; without their mask of infinite logits."""
    if loss != "taid":
        raise NotOfferedError("the published formula of TAID alone")

    def run(given: Problem) -> Tensor:
        x = given.hidden @ given.head.t()
        z = given.teacher_hidden @ given.cut_teacher_head.t()
        p = torch.softmax((1 - TAID_T) * x.detach() + TAID_T * z, -1, dtype=torch.float32)
        per_token = -(p * torch.log_softmax(x, -1, dtype=torch.float32)).sum(-1)
        counts = torch.ones_like(per_token) if given.labels is None else (given.labels != IGNORED).to(per_token.dtype)
        return (per_token * counts).sum() / counts.sum()

    return run


CONTENDERS: dict[str, Callable[..., Loss]] = {
    **{strategy: partial(ours, strategy=strategy) for strategy in STRATEGIES},
    BUDGETED: partial(ours, strategy="tokens", memory_budget=GIB),
    CLUSTERED: lambda loss: _asking(cluster_rows, ours(loss, "tokens")),
    OFFSETS: lambda loss: _asking(offset_logits, ours(loss, "tokens")),
    OFFSETS_CUDA: lambda loss: _asking(partial(offset_logits, "offsets-cuda"), ours(loss, "tokens")),
    "eager": _eager,
    "compiled": _compiled,
    "checkpointed": _checkpointed,
    **peers.CONTENDERS,
    "taid published": _published_taid,
}
# The one loss that is compared: there is no other, or, of torchtune, one more that costs the same.
ONLY = {"liger kl_div": "forward_kl", "fla": "forward_kl", "torchtune": "forward_kl", "taid published": "taid"}
# Whose value is the cross-entropy with the teacher, not the KL, and has the same gradient.
CROSS_ENTROPY = (("taid published", "taid"), ("torchtune", "forward_kl"))
COMPILED = ("compiled", "liger compiled")  # their first step is the compiler's
TRITON = ("liger triton", "liger kl_div", "fla")  # their kernels are Triton's alone, for a GPU


def loss_of(case: Case) -> Loss:
    make = CONTENDERS[case.contender]
    return make(case.loss, memory_budget=case.budget) if case.contender in STRATEGIES else make(case.loss)
