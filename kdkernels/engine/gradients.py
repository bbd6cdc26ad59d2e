"""The student's gradients, as they are added up over chunks of rows and blocks of columns."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.base import Step
from kdkernels.backends.products import HeadProducts, add_head_grad
from kdkernels.engine.cut import Cut
from kdkernels.engine.step import Inputs


class Gradients:
    """Gradients of the student's hidden states, weight and bias; what is not needed is neither computed nor allocated.

    inputs: what the gradients belong to, not cut to the vocabulary. A 16-bit gradient that several chunks or blocks of the cut add
    to is summed in float32. Where ranks share the vocabulary, each adds up its part of the hidden states' gradient, and that of all
    is rounded.
    """

    def __init__(self, step: Step, inputs: Inputs, cut: Cut) -> None:
        hidden, weight, bias = inputs
        self.step, self.vocab = step, step.vocab
        self.hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if step.needs.hidden else None
        self.weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if step.needs.weight else None
        self.bias = torch.zeros_like(bias, dtype=step.sum_dtype) if step.needs.bias and bias is not None else None
        self.bias_dtype = None if bias is None else bias.dtype
        self.weight_sum = None if self.weight is None else self.weight[: self.vocab]
        if self.weight_sum is not None and cut.chunks > 1 and weight.dtype.itemsize == 2:
            self.weight_sum = torch.empty_like(self.weight_sum, dtype=step.sum_dtype)
        self.hidden_sum: Tensor | None = None
        if self.hidden is not None and (cut.blocks > 1 or not step.ranks.alone):
            whole = step.rows is None and self.hidden.dtype == step.sum_dtype
            self.hidden_sum = self.hidden if whole else self.hidden.new_empty((step.count, hidden.shape[1]), dtype=step.sum_dtype)
            if self.vocab == 0:  # a rank that holds no column of the vocabulary adds nothing
                self.hidden_sum.zero_()

    def add(self, head: HeadProducts, dx: Tensor, hidden: Tensor, counted: slice, columns: slice, buffer: Tensor) -> None:
        """A block's logit gradients dx [C, Vb] and the chunk's hidden states [C, D]. counted: the chunk, among the rows that
        count; columns: the block."""
        first = counted.start == 0
        if self.bias is not None:
            here = self.bias[columns]
            torch.sum(dx, 0, dtype=self.bias.dtype, out=here) if first else here.add_(dx.sum(0, dtype=self.bias.dtype))
        if self.hidden_sum is not None:
            head.add_hidden_grad(dx, self.hidden_sum[counted], first=columns.start == 0)
        elif self.hidden is not None:
            index = self.step.index(counted.start, counted.stop)
            if self.hidden.dtype == hidden.dtype and isinstance(index, slice):
                head.hidden_grad(dx, self.hidden[index])
            else:
                part = torch.empty_like(hidden)
                head.hidden_grad(dx, part)
                self._scatter(part, index)
        if self.weight_sum is not None:
            add_head_grad(dx, self._lowered(hidden), self.weight_sum[columns], first, buffer)

    def _lowered(self, hidden: Tensor) -> Tensor:
        return hidden if self.step.lift is None else (hidden / self.step.lift).to(hidden.dtype)

    def _scatter(self, part: Tensor, index: slice | Tensor) -> None:
        assert self.hidden is not None
        # a slice is rounded as it is copied; an index takes values of the dtype alone
        self.hidden[index] = part if isinstance(index, slice) else part.to(self.hidden.dtype)

    def finished(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of hidden states, weight and bias in their dtypes; an empty tensor for each that was not needed."""
        if self.hidden_sum is not None and self.step.count:
            self.step.ranks.sum(self.hidden_sum)
            if self.hidden_sum is not self.hidden:
                self._scatter(self.hidden_sum, self.step.index(0, self.step.count))
        if self.weight is not None and self.weight_sum is not None:
            if self.step.count == 0:
                self.weight.zero_()
            elif self.weight_sum.dtype != self.weight.dtype:
                self.weight[: self.vocab] = self.weight_sum
            self.weight[self.vocab :] = 0
        bias = self.bias
        if bias is not None:
            bias = (bias if self.step.lift is None else bias / self.step.lift).to(self.bias_dtype)
        # An operator may not return one tensor twice, so each absent gradient is an empty tensor of its own.
        made = [self.step.weights.new_empty(0) if grad is None else grad for grad in (self.hidden, self.weight, bias)]
        return made[0], made[1], made[2]
