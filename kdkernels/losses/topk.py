"""The loss against an offline teacher, of which only the k most likely tokens of each position were kept.

There is no teacher's head and no product with one. What the rest of the teacher's vocabulary is taken to be is ``tail``; the
mathematics is in engine/outcomes.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from kdkernels.backends.dtypes import accumulate_dtype
from kdkernels.divergences import Divergence, DivergenceName, resolve
from kdkernels.engine.cut import Strategy
from kdkernels.engine.outcomes import TAILS
from kdkernels.losses.checks import constant, float_tensor, integer_tensor, of_tokens
from kdkernels.losses.head import LMHead
from kdkernels.losses.models import rows_of, side_of, sizing_of
from kdkernels.losses.reduction import reduced
from kdkernels.losses.signatures import Metrics, Reduction, Tail, TopKOptions
from kdkernels.losses.terms import share_of_teacher, terms_of
from kdkernels.losses.tokens import tokens_of
from kdkernels.scalars import cut_vocabulary, flag, one_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def linear_topk_kd_loss(
    student_hidden: Tensor,
    student_head: LMHead | Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    labels: Tensor | None = None,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[TopKOptions],
) -> Tensor: ...
@overload
def linear_topk_kd_loss(
    student_hidden: Tensor,
    student_head: LMHead | Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    labels: Tensor | None = None,
    *,
    return_metrics: Literal[True],
    **options: Unpack[TopKOptions],
) -> tuple[Tensor, Metrics]: ...
@overload
def linear_topk_kd_loss(
    student_hidden: Tensor,
    student_head: LMHead | Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    labels: Tensor | None = None,
    *,
    return_metrics: bool,
    **options: Unpack[TopKOptions],
) -> Tensor | tuple[Tensor, Metrics]: ...
def linear_topk_kd_loss(
    student_hidden: Tensor,
    student_head: LMHead | Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    labels: Tensor | None = None,
    *,
    tail: Tail | None = None,
    topk_rest: Tensor | None = None,
    divergence: Divergence | DivergenceName = "forward_kl",
    t: float | Tensor = 1.0,
    temperature: float = 1.0,
    square_temperature: bool = True,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    check_labels: bool = True,
    vocab_size: int | None = None,
    strategy: Strategy = "auto",
    memory_budget: int | None = None,
    return_metrics: bool = False,
) -> Any:
    """Distillation loss from the student's hidden states and head and the teacher's k most likely tokens of each position.

    Per token: kd_weight T² D(p, q) + ce_weight CE(label, softmax(x)), where D is over a few outcomes and not over the vocabulary:

        tail="renormalize": the k tokens. p is the teacher's distribution over them, q the student's softmax(x / T) over the whole
            vocabulary: tokens outside count as banned by the teacher, and have no terms. With u the student's mass there, that
            leaves out nothing of forward_kl and skew_forward_kl, u / 2 of total_variation and (1 - beta) u log(1 / (1 - beta)) of
            jsd; all four stay divergences, least at q = p. Of skew_reverse_kl it leaves out u log(1 / alpha) and of reverse_kl
            what is infinite; these two fall below 0 as mass leaves the k tokens, and are none.
        tail="bucket": the k tokens and one outcome for all others, with what is left of each model's mass. How the student divides
            that among them is left to it. Every divergence stays one.
        tail=None: "bucket" where topk_rest is given and for reverse_kl and skew_reverse_kl, else "renormalize".

    The target is softmax((1 - t) log q + t log p) over these outcomes, with q held constant: t < 1 is TAID.

    student_hidden: (..., D_s). student_head: an LMHead or its (V, D_s) weight. Dtypes, autocast and gradients are as for
        ``linear_kd_loss``.
    topk_ids: (..., K) integers, K at least 1, distinct tokens in each position.
    topk_logprobs: (..., K) floats of any dtype, log softmax(z / T) of the teacher at these tokens, at this loss's temperature. -inf
        marks a slot that is not used, whose id is ignored: positions may keep fewer than K. Without any, kd is 0 there. Values that
        sum up to more than 1 are not refused: they are normalised.
    topk_rest: (...,) floats, the log-probability of all other tokens together, for "bucket"; ``write_cache`` keeps it. -inf: they
        are banned by the teacher, and have no term. None: what the k leave of 1, and at least 2^-23, below which the k tell nothing
        when they are rounded to float32 (to 16 bits, far above): of a confident teacher the rest is best given.
    check_labels: as there; False leaves the tokens unchecked too, and the loss NaN where one is out of range or twice.
    return_metrics: as there, with two differences: target_entropy is over the target's outcomes, and overlap is the sum of
        min(q, p) over the k tokens, which is a lower bound of that over the vocabulary.
    vocab_size: cut the head to its first rows (a padded vocabulary); the rest gets zero gradient.
    strategy: "tokens" takes 3 products of the student, "vocab" 4, for every divergence, in blocks of the vocabulary; "auto" is the
        one that is predicted to be faster. memory_budget: bytes of scratch for the student's logits.
    The other arguments, reductions and errors are those of ``linear_kd_loss``.

    The work on logits is plain torch on every device. Raises ValueError or TypeError for bad input before any work; tokens out of
    range and tokens that are twice in a position are found with the labels, in the call's one host sync, where the position counts.
    """
    student = side_of("student", student_hidden, student_head)
    known = _known(student_hidden, topk_ids, topk_logprobs, topk_rest)
    dtype = accumulate_dtype(student.dtype)
    given = {
        **student.arguments("student"),
        **known,
        **sizing_of(strategy, memory_budget),
        **terms_of(divergence, temperature, square_temperature, kd_weight, ce_weight),
        "head": student.transform,
        "vocab": cut_vocabulary(student.head.weight.shape[0], vocab_size, "the rows of student_head"),
        "t": share_of_teacher(t, dtype, student_hidden.device),
        "tail": _tail(tail, topk_rest, divergence),
    }
    tokens = tokens_of(
        "student_hidden", student_hidden, labels, token_weight, ignore_index, reduction, normalizer, check_labels, ce_weight
    )
    return_metrics = flag("return_metrics", return_metrics)
    (value,), metrics = reduced("linear_topk_kd", given, tokens, dtype, return_metrics)
    return (value, metrics) if return_metrics else value


def _known(student_hidden: Tensor, topk_ids: Any, topk_logprobs: Any, topk_rest: Any) -> dict[str, Any]:
    """The operator's arguments of what is known of the teacher, checked."""
    device = student_hidden.device
    integer_tensor("topk_ids", topk_ids, device)
    float_tensor("topk_logprobs", topk_logprobs, device)
    lead = student_hidden.shape[:-1]
    if topk_ids.dim() < 1 or topk_ids.shape[:-1] != lead or topk_ids.shape[-1] == 0:
        raise ValueError(
            f"topk_ids has shape {tuple(topk_ids.shape)}; student_hidden {tuple(student_hidden.shape)} needs "
            f"({', '.join(map(str, (*lead, 'K')))}) with K at least 1"
        )
    if topk_logprobs.shape != topk_ids.shape:
        raise ValueError(f"topk_logprobs {tuple(topk_logprobs.shape)} and topk_ids {tuple(topk_ids.shape)} must have one shape")
    constant("topk_logprobs", topk_logprobs)
    if topk_rest is not None:
        of_tokens("topk_rest", float_tensor("topk_rest", topk_rest, device), student_hidden, "student_hidden")
        constant("topk_rest", topk_rest)
    return {
        "topk_ids": rows_of(topk_ids).to(torch.int64),
        "topk_logprobs": rows_of(topk_logprobs.detach()),
        "topk_rest": None if topk_rest is None else topk_rest.detach().reshape(-1),
    }


def _tail(tail: Any, topk_rest: Tensor | None, divergence: Divergence | str) -> str:
    """What the rest of the teacher's vocabulary is taken to be."""
    if tail is None:
        return "bucket" if topk_rest is not None or resolve(divergence).weighed_by_student else "renormalize"
    if one_of("tail", tail, TAILS) == "renormalize" and topk_rest is not None:
        raise ValueError("topk_rest is given, and tail='renormalize' has no rest; accepted with it: tail='bucket' or None")
    return str(tail)
