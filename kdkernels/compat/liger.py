"""Liger-Kernel's ``LigerFusedLinearJSDLoss``, computed here: the same constructor, the same call, the same loss.

    # from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from kdkernels.compat.liger import LigerFusedLinearJSDLoss

    loss_fn = LigerFusedLinearJSDLoss(weight_hard_loss=0.1, weight_soft_loss=0.9, beta=0.5, temperature=2.0)
    loss = loss_fn(student_hidden, student_head.weight, teacher_hidden, teacher_head.weight, labels)

Written after the chunked_loss of liger-kernel 0.8.5, which need not be installed. What is Liger's convention is kept: no T² on the
soft loss, the hard loss at temperature 1, both divided by the number of labels that are not ``ignore_index``, which end of ``beta``
is which divergence, and gradients for the student alone. These differ, on purpose:

- log-softmax and the sums of the head's gradient are in float32 for 16-bit inputs (there: in 16 bit); float64 inputs give a float64
  loss (there: summed in float32);
- an entry of the vocabulary that either model bans (a logit of -inf) adds nothing (there: NaN);
- rows whose label is ``ignore_index`` are dropped before any product, whatever they hold (there: NaN in one is NaN in all
  gradients);
- a frozen head costs no product and no memory (there: its gradient is made and thrown away);
- a teacher whose vocabulary is padded further is cut to the student's rows (there: the student is given logits of 0 for the
  padding, hence probability that it does not have). A teacher with fewer rows is a ValueError (there: an error about shapes).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.compat.conventions import divergence_of_beta
from kdkernels.losses.checks import float_tensor, integer_tensor
from kdkernels.losses.head import LMHead, fitting
from kdkernels.losses.linear import linear_kd_loss
from kdkernels.scalars import number, whole


class LigerFusedLinearJSDLoss(nn.Module):
    """weight_hard_loss CE(label, student) + weight_soft_loss D(teacher, student), from hidden states and heads; mean over labels.

    weight_hard_loss, weight_soft_loss: numbers of at least 0.
    beta: in [0, 1]; 0 is KL(teacher, student), 1 is KL(student, teacher), in between the generalised Jensen-Shannon divergence
        beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (arXiv 2306.13649), p the teacher, q the student.
    ignore_index: the label of positions that do not count. temperature: T > 0, of D alone, without a factor T².
    compiled, chunk_size: taken so that calls need not change; they have no effect. Nothing here is compiled, and how many rows are
        worked on at once follows from the memory that ``kd.linear_kd_loss`` allows itself.
    return_soft_hard_loss: also return both terms.

    All are kept as attributes of these names, which may be set later; the call reads them. Raises ValueError or TypeError that
    names the argument.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.beta = beta
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss
        self._options()

    def _options(self) -> dict[str, Any]:
        """The attributes as ``linear_kd_loss`` takes them, after a look at each."""
        for name in ("weight_hard_loss", "weight_soft_loss"):
            number(name, getattr(self, name), "a number of at least 0", 0.0)
        number("temperature", self.temperature, "a positive number", 0.0, above=True)
        whole("ignore_index", self.ignore_index, "an integer")
        return {
            "divergence": divergence_of_beta(self.beta),
            "temperature": self.temperature,
            "square_temperature": False,
            "kd_weight": self.weight_soft_loss,
            "ce_weight": self.weight_hard_loss,
            "ignore_index": self.ignore_index,
        }

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Any:
        """student_input (..., D_s), student_weight (V, D_s), student_bias (V,); teacher_input (..., D_t), teacher_weight (V, D_t),
        teacher_bias (V,): float32, bfloat16, float16 or float64, an input in the dtype of its weight unless torch.autocast is on.
        true_labels (...): integers, the token to predict at each position.

        Returns the loss, or with ``return_soft_hard_loss`` (loss, soft, hard): 0-dim tensors in float32 (float64 for float64
        inputs). Gradients of the loss go to the student's tensors that require them; soft and hard, without their weights, have
        none.

        Raises ValueError or TypeError that names the argument.
        """
        options = self._options()
        for name, hidden, weight, bias in (
            ("student", student_input, student_weight, student_bias),
            ("teacher", teacher_input, teacher_weight, teacher_bias),
        ):
            float_tensor(f"{name}_input", hidden)
            fitting(hidden, weight, bias, f"{name}_input", f"{name}_weight", f"{name}_bias")
        integer_tensor("true_labels", true_labels)
        leading = student_input.shape[:-1]
        if teacher_input.shape[:-1] != leading or true_labels.shape != leading:
            raise ValueError(
                f"student_input {tuple(student_input.shape)} and teacher_input {tuple(teacher_input.shape)} must agree in all "
                f"dimensions but the last, and true_labels {tuple(true_labels.shape)} must have these"
            )
        rows, of_teacher = student_weight.shape[0], teacher_weight.shape[0]
        if of_teacher < rows:
            raise ValueError(
                f"teacher_weight has {of_teacher} rows, student_weight {rows}; accepted: at least as many as the student"
            )
        if not (self.weight_hard_loss or self.return_soft_hard_loss):
            # Labels then only say which positions count, and need not be rows of the heads.
            true_labels = torch.where(true_labels == self.ignore_index, -100, 0)
            options["ignore_index"] = -100
        found = linear_kd_loss(
            student_input,
            LMHead(student_weight, student_bias),
            teacher_input.detach(),
            LMHead(teacher_weight, teacher_bias).detach(),
            true_labels,
            vocab_size=rows,
            return_metrics=self.return_soft_hard_loss,
            **options,
        )
        if not self.return_soft_hard_loss:
            return found
        loss, terms = found
        return loss, terms["kd"], terms["ce"]

    def extra_repr(self) -> str:
        names = ("weight_hard_loss", "weight_soft_loss", "beta", "ignore_index", "temperature", "return_soft_hard_loss")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
