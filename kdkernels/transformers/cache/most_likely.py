"""The most likely next tokens of a model, their log-probabilities and that of all others, without the logits of a whole batch.

Hidden states of a padded batch come from the model's own forward; the head multiplies a chunk of the real tokens at a time, into a
scratch that a byte budget bounds, and of each row only the largest entries are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.backends.dtypes import accumulate_dtype, logits_dtype, product_dtype
from kdkernels.backends.head import apply_head
from kdkernels.backends.products import HeadProducts, block_size
from kdkernels.engine.cut import chunk_rows
from kdkernels.engine.scratch import borrowed
from kdkernels.losses.head import LMHead
from kdkernels.transformers.data import Collator
from kdkernels.transformers.heads import unwrapped
from kdkernels.transformers.hidden import hidden_states


class MostLikely:
    """The top_k largest entries of log softmax(z / temperature) over the first ``vocab`` logits z of a model, for batches of
    sequences.

    budget: bytes for the logits of a chunk and what is made from them.
    """

    def __init__(
        self,
        model: nn.Module,
        head: LMHead,
        *,
        top_k: int,
        temperature: float,
        vocab: int,
        budget: int,
    ) -> None:
        embeddings: Any = unwrapped(model).get_input_embeddings()
        self.model, self.device = model, embeddings.weight.device  # that of the token ids
        self.top_k, self.temperature, self.budget = top_k, temperature, budget
        self.weight, self.logit_scale, self.softcap = head.weight[:vocab], head.logit_scale, head.softcap
        dtype, device = head.weight.dtype, head.weight.device
        self.made, self.product = logits_dtype(dtype, device), product_dtype(dtype, device)
        self.sum = accumulate_dtype(self.made)
        self.bias = None if head.bias is None else head.bias[:vocab].to(self.sum)
        # The logits, the exponentials that the log-sum-exp adds up, and the logits once more where they have to be widened.
        self.bytes_per_logit = self.sum.itemsize * (2 if self.made == self.sum else 3)

    @torch.no_grad()
    def __call__(
        self, sequences: list[Tensor], further: Sequence[Mapping[str, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """sequences: token ids (L,) int64 on the CPU, each; they are padded on the right. further: each one's other columns.

        Returns ids int32 and log-probabilities float32, both (tokens of all sequences one after another, top_k), the most likely
        first, and the log-probability of all others together, float32 (tokens,); all on the CPU. A row whose logits hold NaN or
        +inf, or nothing but -inf, starts with NaN.
        """
        batch = Collator(None)(
            [{**more, "input_ids": ids} for ids, more in zip(sequences, further or [{}] * len(sequences), strict=True)]
        )
        for name, value in batch.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} has several shapes in a batch of examples, or is not in all; accepted: batch_size=1")
        inputs, mask = {name: value.to(self.device) for name, value in batch.items()}, batch["attention_mask"]
        where, (vocab, width) = self.weight.device, self.weight.shape
        hidden = hidden_states(self.model, inputs).to(where)
        hidden = hidden[mask.to(where) != 0]  # no product for the padding
        size = chunk_rows(len(hidden), vocab, self.bytes_per_logit, self.budget, where)
        block = block_size(vocab, width, where)
        with borrowed(block, [((size, vocab), self.made)], self.budget, where) as (buffer, (logits,)):
            products = HeadProducts(self.weight, self.product, buffer)
            parts = [self._top(products, rows, logits[: len(rows)]) for rows in hidden.split(size)]
        ids, logprobs, rest = map(torch.cat, zip(*parts, strict=True))
        return ids, logprobs, rest

    def _top(self, products: HeadProducts, hidden: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        products.logits(hidden.to(self.product), logits)
        z = logits.to(self.sum)  # the scratch itself, unless it has to be widened
        apply_head(z, self.bias, self.logit_scale, self.softcap or 0.0, in_place=True).div_(self.temperature)
        values, ids = z.topk(self.top_k)
        # Apart and in float64: of a confident teacher 1 less the sum of the top_k has no digits, nor has 0 less the largest.
        chosen, rest = values.double().logsumexp(1), z.scatter_(1, ids, -torch.inf).logsumexp(1).double()
        whole = torch.logaddexp(chosen, rest)
        logprobs = values.double() - whole[:, None]
        return ids.to("cpu", torch.int32), logprobs.to("cpu", torch.float32), (rest - whole).to("cpu", torch.float32)
