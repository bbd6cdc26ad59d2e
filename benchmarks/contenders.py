"""The distillation losses that are timed side by side: ours, plain PyTorch, and the libraries that offer the same loss.

Every contender is a function of one ``Problem`` that returns the mean loss over its tokens as a 0-dim tensor with a gradient to the
student's hidden states and head. Nothing of another library is imported before its contender is asked for; whatever is raised then
is the reason in the result file.

Conventions of the others, read from their source: Liger's and TRL's beta is 0 for KL(teacher ‖ student), and at 1/2 their
divergence is the symmetric Jensen-Shannon one, as here. The teacher's rows past the student's vocabulary (Qwen2.5 pads its larger
models further) are cut off by a view for those that have no option for it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div

import kdkernels as kd

LOSSES = ("forward_kl", "jsd")
_BETA = {"forward_kl": 0.0, "jsd": 0.5}


@dataclass(frozen=True)
class Head:
    """A student's output head and its teacher's: rows V and widths D."""

    student: str
    teacher: str
    vocab: int
    teacher_vocab: int
    student_dim: int
    teacher_dim: int


HEADS = {
    "qwen2.5": Head("Qwen2.5-0.5B", "Qwen2.5-7B", 151_936, 152_064, 896, 3584),
    "llama3": Head("Llama-3.2-1B", "Llama-3.1-8B", 128_256, 128_256, 2048, 4096),
    "gemma3": Head("Gemma-3-1B", "Gemma-3-12B", 262_144, 262_144, 1152, 3840),
}


@dataclass(frozen=True)
class Problem:
    """hidden: [N, D_s] and head: [V, D_s], both leaves; teacher_hidden: [N, D_t]; teacher_head: [at least V, D_t]."""

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor

    @property
    def vocab(self) -> int:
        return self.head.shape[0]

    @property
    def cut_teacher_head(self) -> Tensor:
        return self.teacher_head[: self.vocab]


Loss = Callable[[Problem], Tensor]


def problem(head: Head, tokens: int, dtype: torch.dtype, device: str) -> Problem:
    """Random hidden states and heads whose logits have standard deviation 1, the same ones at every call."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, dim: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, dim, generator=generator, device=device, dtype=dtype).mul_(scale)

    return Problem(
        normal(tokens, head.student_dim).requires_grad_(),
        normal(head.vocab, head.student_dim, head.student_dim**-0.5).requires_grad_(),
        normal(tokens, head.teacher_dim),
        normal(head.teacher_vocab, head.teacher_dim, head.teacher_dim**-0.5),
    )


def products(given: Problem, block: int) -> Callable[[], None]:
    """The four bare products x, z, dH and dW (3 Us + Ut operations) in blocks of ``block`` tokens, into tensors made on the way.

    They are what no loss with both gradients can do without. x stands in for its gradient: the values are as random.
    """
    hidden, head = given.hidden.detach(), given.head.detach()
    teacher_hidden, teacher_head = given.teacher_hidden, given.cut_teacher_head

    def run() -> None:
        hidden_grad, head_grad = torch.empty_like(hidden), torch.empty_like(head)
        x, z = (hidden.new_empty(min(block, len(hidden)), given.vocab) for _ in range(2))
        for begin in range(0, len(hidden), block):
            rows = hidden[begin : begin + block]
            here = slice(begin, begin + len(rows))
            torch.mm(rows, head.t(), out=x[: len(rows)])
            torch.mm(teacher_hidden[here], teacher_head.t(), out=z[: len(rows)])
            torch.mm(x[: len(rows)], head, out=hidden_grad[here])
            torch.addmm(head_grad, x[: len(rows)].t(), rows, beta=float(begin > 0), out=head_grad)

    return run


def _ours(loss: str, strategy: str) -> Loss:
    def run(given: Problem) -> Tensor:
        value: Tensor = kd.linear_kd_loss(
            given.hidden,
            given.head,
            given.teacher_hidden,
            given.teacher_head,
            divergence=loss,
            vocab_size=given.vocab,
            strategy=strategy,
        )
        return value

    return run


def _eager_forward_kl(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    lq = (hidden @ head.t()).log_softmax(-1)
    lp = (teacher_hidden @ teacher_head.t()).log_softmax(-1)
    return kl_div(lq, lp, reduction="sum", log_target=True) / len(hidden)


def _eager_jsd(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    lq = (hidden @ head.t()).log_softmax(-1)
    lp = (teacher_hidden @ teacher_head.t()).log_softmax(-1)
    lm = torch.logaddexp(lp, lq) - math.log(2.0)
    both = kl_div(lm, lp, reduction="sum", log_target=True) + kl_div(lm, lq, reduction="sum", log_target=True)
    return 0.5 * both / len(hidden)


_EAGER = {"forward_kl": _eager_forward_kl, "jsd": _eager_jsd}


def _eager(loss: str) -> Loss:
    """As one writes it, in the dtype of the hidden states throughout: faster and smaller than with logits widened to float32."""
    formula = _EAGER[loss]
    return lambda given: formula(given.hidden, given.head, given.teacher_hidden, given.cut_teacher_head)


def _compiled(loss: str) -> Loss:
    torch._dynamo.reset()
    # with the interpreter there is nothing to be fast for, and compiling takes longer than all else
    backend = "eager" if os.environ.get("TRITON_INTERPRET") == "1" else "inductor"
    formula = torch.compile(_EAGER[loss], dynamic=False, backend=backend)
    return lambda given: formula(given.hidden, given.head, given.teacher_hidden, given.cut_teacher_head)


def _liger_chunked(loss: str) -> Loss:
    """Liger-Kernel's chunked loss in torch, compiled by itself; without its hard-label term."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    torch._dynamo.reset()
    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=_BETA[loss])

    def run(given: Problem) -> Tensor:
        labels = torch.zeros(len(given.hidden), dtype=torch.int64, device=given.hidden.device)
        inputs = (given.hidden, given.head, given.teacher_hidden, given.cut_teacher_head, labels)
        value: Tensor = module(*inputs, student_bias=None, teacher_bias=None)
        return value

    return run


def _liger_triton(loss: str) -> Loss:
    """Liger-Kernel's fused linear JSD around its Triton kernel."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=_BETA[loss])

    def run(given: Problem) -> Tensor:
        value: Tensor = module(given.hidden, given.head, given.teacher_hidden, given.cut_teacher_head, None)
        return value

    return run


def _trl(loss: str) -> Loss:
    """TRL's chunked divergence: a value per token, whose mean is taken."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run(given: Problem) -> Tensor:
        student, teacher = (given.hidden, given.head, None), (given.teacher_hidden, given.cut_teacher_head, None)
        divergence, _ = ChunkedDivergenceFunction.apply(*student, *teacher, _BETA[loss])
        value: Tensor = divergence.mean()
        return value

    return run


CONTENDERS: dict[str, Callable[[str], Loss]] = {
    "tokens": lambda loss: _ours(loss, "tokens"),
    "vocab": lambda loss: _ours(loss, "vocab"),
    "eager": _eager,
    "compiled": _compiled,
    "liger chunked": _liger_chunked,
    "liger triton": _liger_triton,
    "trl": _trl,
}
