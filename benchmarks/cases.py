"""What is measured: output heads, cases (one problem, and who computes its loss), and the random tensors that a case is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd

MIB, GIB = 2**20, 2**30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IGNORED = -100
LOSSES = ("forward_kl", "reverse_kl", "jsd", "taid")
ONLINE = "okd"  # the loss of which both models learn
SPREAD = 3.0  # standard deviation of the logits: a few tokens hold most of the probability, as in a trained model


@dataclass(frozen=True)
class Head:
    """A student's output head and its teacher's: rows V and widths D. name: what rows call it."""

    name: str
    student: str
    teacher: str
    vocab: int
    teacher_vocab: int
    student_dim: int
    teacher_dim: int

    def cut(self, vocab: int) -> Head:
        return replace(self, vocab=vocab, teacher_vocab=vocab)


HEADS = {
    head.name: head
    for head in (
        Head("qwen2.5", "Qwen2.5-0.5B", "Qwen2.5-7B", 151_936, 152_064, 896, 3584),
        Head("llama3", "Llama-3.2-1B", "Llama-3.1-8B", 128_256, 128_256, 2048, 4096),
        Head("gemma3", "Gemma-3-1B", "Gemma-3-12B", 262_144, 262_144, 1152, 3840),
    )
}


@dataclass(frozen=True)
class Case:
    """What a row of a result file is about.

    part: of its benchmark. contender: a name of ``contenders.CONTENDERS``. masked: half of the tokens do not count. budget: bytes
    of scratch for logits, for ours. limit: bytes that the process may hold.
    """

    part: str
    head: Head
    tokens: int
    dtype: str
    contender: str = "auto"
    loss: str = "forward_kl"
    masked: bool = False
    budget: int | None = None
    limit: int | None = None

    def __str__(self) -> str:
        """What reports and ``--only`` call it."""
        return name(self.facts)

    @property
    def facts(self) -> dict[str, Any]:
        """What its row says before anything is measured."""
        head = {"vocab": self.head.vocab, "student_dim": self.head.student_dim, "teacher_dim": self.head.teacher_dim}
        more = {"budget": self.budget, "limit": self.limit}
        return {
            **{"part": self.part, "head": self.head.name, "dtype": self.dtype, "contender": self.contender, "loss": self.loss},
            **{"masked": self.masked, "tokens": self.tokens, **head},
            **{key: value for key, value in more.items() if value is not None},
        }

    @property
    def divergence(self) -> Any:
        """As the library calls it."""
        return "forward_kl" if self.loss in ("taid", ONLINE) else self.loss

    @property
    def returned_bytes(self) -> int:
        """Of the gradients."""
        entries = (self.tokens + self.head.vocab) * self.head.student_dim
        return (entries + (self.tokens * self.head.teacher_dim if self.loss == ONLINE else 0)) * DTYPES[self.dtype].itemsize

    def plan(self, strategy: Any) -> kd.Plan:
        sizes = self.tokens, self.head.vocab, self.head.student_dim, self.head.teacher_dim, DTYPES[self.dtype]
        options: dict[str, Any] = {"divergence": self.divergence, "online_teacher": self.loss == ONLINE}
        return kd.plan(*sizes, memory_budget=self.budget, strategy=strategy, **options)


_KEY = ("part", "head", "dtype", "contender", "loss", "masked", "tokens", "vocab", "budget")


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """By which a row replaces an earlier one."""
    return tuple(map(row.get, _KEY))


def name(row: dict[str, Any]) -> str:
    """What a row is about, in a few words."""
    extras = ["masked"] if row["masked"] else []
    extras += [f"{row['budget'] / MIB:g} MiB"] if "budget" in row else []
    words = (row["head"], row["dtype"], row["contender"], row["loss"], f"N={row['tokens']}", f"V={row['vocab']}", *extras)
    return f"{row['part']}: {' '.join(words)}"


@dataclass(frozen=True)
class Problem:
    """hidden: [N, D_s] and head: [V, D_s], both leaves; teacher_hidden: [N, D_t], a leaf where the teacher learns too;
    teacher_head: [at least V, D_t].

    labels: [N] int64, ``IGNORED`` where a token does not count; None counts all of them.
    """

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor | None = None

    @property
    def vocab(self) -> int:
        return self.head.shape[0]

    @property
    def cut_teacher_head(self) -> Tensor:
        return self.teacher_head[: self.vocab]

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        """The hidden states of student and teacher, [K, D_s] and [K, D_t], without the tokens that do not count."""
        if self.labels is None:
            return self.hidden, self.teacher_hidden
        keep = self.labels != IGNORED
        return self.hidden[keep], self.teacher_hidden[keep]

    def first(self, tokens: int, vocab: int) -> Problem:
        """Its first tokens, over the first of the vocabulary."""

        def leaf(tensor: Tensor, count: int) -> Tensor:
            return tensor.detach()[:count].requires_grad_(tensor.requires_grad)

        hidden, teacher_hidden = leaf(self.hidden, tokens), leaf(self.teacher_hidden, tokens)
        labels = None if self.labels is None else self.labels[:tokens]
        return Problem(hidden, leaf(self.head, vocab), teacher_hidden, self.teacher_head[:vocab], labels)

    def forget(self) -> None:
        """Lets the gradients go."""
        self.hidden.grad = self.head.grad = self.teacher_hidden.grad = None


def problem(case: Case, device: str = "cpu", spread: float = SPREAD) -> Problem:
    """Random hidden states and heads whose logits have standard deviation ``spread``, the same ones at every call."""
    generator = torch.Generator(device).manual_seed(0)
    head, tokens, dtype, online = case.head, case.tokens, DTYPES[case.dtype], case.loss == ONLINE

    def normal(rows: int, dim: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, dim, generator=generator, device=device, dtype=dtype).mul_(scale)

    return Problem(
        normal(tokens, head.student_dim).requires_grad_(),
        normal(head.vocab, head.student_dim, spread * head.student_dim**-0.5).requires_grad_(),
        normal(tokens, head.teacher_dim).requires_grad_(online),
        normal(head.teacher_vocab, head.teacher_dim, spread * head.teacher_dim**-0.5),
        half_masked(tokens, device) if case.masked else torch.arange(tokens, device=device) % head.vocab if online else None,
    )


def half_masked(tokens: int, device: str = "cpu") -> Tensor:
    """Labels [N], int64. The first half of every 64 is ignored (of all N where they are fewer), like a prompt before its answer."""
    span = min(64, tokens)
    position = torch.arange(tokens, device=device)
    return torch.where(position % span < span // 2, IGNORED, 0)
