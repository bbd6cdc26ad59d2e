"""Batches that the student writes itself, so that it is taught where its own text leads it and not only where the data does.

Two ways to mix them with the data:

- GKD (arXiv 2306.13649): with probability lambda a batch's prompts are continued by the student, and the teacher scores that;
- DistiLLM (arXiv 2402.03898): lambda grows while the validation loss does not fall, and what was written is used again from a
  buffer, the more often the nearer training is to its end.

Chance comes from counters. Where a batch comes from is a function of (seed, step, micro-batch), the same on every rank; its tokens
are one of those and the rank. A run that was resumed repeats what it would have done, and nobody else's random numbers move.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kdkernels.scalars import count, number, share, whole
from kdkernels.transformers.batches.layout import IGNORED
from kdkernels.transformers.batches.reading import most_positions
from kdkernels.transformers.heads import unwrapped
from kdkernels.transformers.writing import most_of_ranks, responses, writer

SCHEDULES = ("constant", "adaptive")
DATA, GENERATED, REPLAYED = "data", "generated", "replayed"
GROWTH = 0.1  # of lambda, as DistiLLM has it
KEYS = ("input_ids", "attention_mask", "labels")


class _Row(NamedTuple):
    """One example on the CPU, without padding."""

    tokens: Tensor  # (n,) int64
    labels: Tensor  # (n,) int64


class _Written(NamedTuple):
    """One example of the student's, as the buffer keeps it."""

    tokens: Tensor  # (n,) int32, on the CPU: prompt and response
    prompt: int  # how many of them are the prompt

    def row(self) -> _Row:
        tokens = self.tokens.long()
        labels = tokens.clone()
        labels[: self.prompt] = IGNORED
        return _Row(tokens, labels)


class OnPolicy:
    """Decides for each batch where it comes from, and lets the student write it.

    fraction: lambda, the probability that a batch is not the data, in [0, 1]; where it starts in the adaptive schedule.
    schedule: "constant" (GKD): such a batch is always written anew. "adaptive" (DistiLLM): it is written anew with probability
        1 - progress, or as long as the buffer is not full, and otherwise drawn from the buffer; ``observe`` lets lambda grow.
    max_new_tokens: most tokens of a response, at least 1. temperature, top_k (0: off), top_p (1: off): of the sampling.
    replay_size: sequences in the buffer (of each rank); the oldest make room. Only the adaptive schedule has one.
    seed: of every choice made here.
    pad_token_id: what fills up shorter sequences; masked, so any token does, and None takes the end token or 0.
    eos_token_id: one token, or several, that end a response; None: each has max_new_tokens.
    vocab_size: only the first so many tokens are written, where teacher and student differ in how far their heads are padded.
    positions: the longest sequence, where the teacher takes a shorter one than the student.

    Raises ValueError or TypeError that names the argument, what came and what is accepted.
    """

    def __init__(
        self,
        fraction: float,
        *,
        schedule: str = "constant",
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        replay_size: int = 1000,
        seed: int = 0,
        pad_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        vocab_size: int | None = None,
        positions: int | None = None,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule {schedule!r} is not known; accepted: {', '.join(SCHEDULES)}")
        self.fraction = share("fraction", fraction)
        self.adaptive = schedule == "adaptive"
        self.replay_size = count("replay_size", replay_size)
        self.seed = whole("seed", seed, "a whole number")
        ends = eos_token_id if eos_token_id is None or isinstance(eos_token_id, Sequence) else [eos_token_id]
        self.ends = [] if ends is None else [count("eos_token_id", end, 0) for end in ends]
        if ends is not None and not self.ends:
            raise ValueError("eos_token_id is a token, at least one of them, or None, got an empty sequence")
        self.pad = (self.ends or [0])[0] if pad_token_id is None else count("pad_token_id", pad_token_id, 0)
        self.vocab_size = None if vocab_size is None else count("vocab_size", vocab_size)
        self.positions = None if positions is None else count("positions", positions)
        self.max_new_tokens = count("max_new_tokens", max_new_tokens)
        self.sampling = {
            "do_sample": True,
            "temperature": number("temperature", temperature, "a positive number", 0.0, above=True),
            "top_k": count("top_k", top_k, 0),
            "top_p": number("top_p", top_p, "a number in (0, 1]", 0.0, 1.0, above=True),
            "pad_token_id": self.pad,
            "eos_token_id": self.ends or None,
            "max_new_tokens": self.max_new_tokens,
            "use_cache": True,  # also where the model's configuration says no, for training's sake
        }
        self._buffer: deque[_Written] = deque(maxlen=self.replay_size)
        self._previous = math.nan  # the validation loss before; NaN until there is one

    def batch(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        *,
        step: int,
        micro: int,
        progress: float,
        rank: int = 0,
        synced: bool = False,
    ) -> tuple[dict[str, Tensor], str]:
        """The batch to train on, and where it comes from: "data", "generated" or "replayed".

        model: the student, a causal language model of transformers, also inside DistributedDataParallel, FSDP2, PEFT (its adapters
            at work) or torch.compile. It writes in evaluation mode, with its generation_config left out of account, and is
            afterwards as it was.
        batch: {"input_ids": (B, S), "labels": (B, S), "attention_mask": (B, S) or absent}, padded on either side, on the model's
            device; labels are not shifted and -100 where nothing is learned. Other keys are refused: they say something about the
            data's tokens, which are replaced.
        step, micro: the optimizer step and the micro-batch in it. progress: finished steps / total steps, in [0, 1].
        rank: of the process; ranks agree on where a batch comes from and write different tokens.
        synced: ranks run their forwards together (FSDP): each takes part until the last has finished.

        A prompt is what comes before the first label that counts; a row without one, whose first token counts already, gives half
        of its tokens (up to the last that counts). The new row is prompt and response, up to and with its first end token, and the
        prompt's labels are -100. A row keeps its data where no label counts, and where prompt and max_new_tokens do not fit in the
        positions that the models' configurations give; a batch where all rows do is "data". New batches are padded on the right,
        to the longest row, in the dtypes of the old one.

        Where torch.distributed is initialised, the adaptive schedule asks all ranks whether their buffers are full.
        """
        rows = _checked(batch)
        for name, value in {"step": step, "micro": micro, "rank": rank}.items():
            count(name, value, 0)
        share("progress", progress)
        if self.adaptive and rows > self.replay_size:
            raise ValueError(f"replay_size={self.replay_size} is smaller than a batch of {rows} rows; accepted: {rows} or more")
        positions = self._positions(writer(model)[1])
        if positions is not None and self.max_new_tokens >= positions:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt in the {positions} positions of "
                f"{type(unwrapped(model)).__name__} and its teacher; accepted: 1 to {positions - 1}"
            )
        source = self._source(_uniform("source", self.seed, step, micro), progress, batch["input_ids"].device)
        found: list[_Row] | None = None
        if source == REPLAYED:
            generator = torch.Generator().manual_seed(_key("replay", self.seed, step, micro, rank))
            drawn = torch.randperm(len(self._buffer), generator=generator)[:rows]
            found = [self._buffer[place].row() for place in drawn.tolist()]
        elif source == GENERATED:
            found = self._written(model, batch, _key("tokens", self.seed, step, micro, rank), synced)
        return (dict(batch), DATA) if found is None else (self._collated(found, batch), source)

    def observe(self, validation_loss: float) -> None:
        """Let the adaptive schedule see an evaluation; a constant one takes no notice.

        Lambda grows by 0.1, to at most 1, where the loss is not below that of the evaluation before. (In the authors' code: not
        below the loss at which it grew last, plus a margin.) The first evaluation, and a loss that is not finite, change nothing.
        To be called on every rank with the same loss.
        """
        if isinstance(validation_loss, bool) or not isinstance(validation_loss, (int, float)):
            raise TypeError(f"validation_loss is a number, got {type(validation_loss).__name__}")
        if not self.adaptive or not math.isfinite(validation_loss):
            return
        if validation_loss >= self._previous:
            self.fraction = min(1.0, self.fraction + GROWTH)
        self._previous = float(validation_loss)

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors: lambda, the last validation loss (NaN: none), and the buffer of this rank, oldest first."""
        tokens = [written.tokens for written in self._buffer]
        return {
            "fraction": self.fraction,
            "previous": self._previous,
            "tokens": torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int32),
            "lengths": torch.tensor([len(one) for one in tokens], dtype=torch.int64),
            "prompts": torch.tensor([written.prompt for written in self._buffer], dtype=torch.int64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``; of a buffer larger than this one the newest stay. A constant schedule keeps its own fraction.

        Raises ValueError for a state that is not one, and changes nothing then.
        """
        wanted = self.state_dict().keys()
        if state.keys() != wanted:
            raise ValueError(f"state has the keys {', '.join(map(str, state))}; accepted: those of state_dict, {', '.join(wanted)}")
        fraction = share("state['fraction']", state["fraction"])
        tokens, lengths, prompts = (state[name] for name in ("tokens", "lengths", "prompts"))
        if not (
            len(lengths) == len(prompts) and int(lengths.sum()) == len(tokens) and bool(((prompts > 0) & (prompts < lengths)).all())
        ):
            raise ValueError(
                f"state holds {len(tokens)} tokens, {len(lengths)} lengths of {int(lengths.sum())} in all, and {len(prompts)} "
                "prompts; accepted: lengths that add up to the tokens, each with a shorter prompt of at least 1"
            )
        if not self.adaptive:
            return
        self.fraction, self._previous = fraction, float(state["previous"])
        # Cloned: else every row would keep the whole state alive.
        rows = [row.clone() for row in tokens.to("cpu", torch.int32).split(lengths.tolist())] if len(lengths) else []
        self._buffer = deque(map(_Written, rows, prompts.tolist()), maxlen=self.replay_size)

    def _positions(self, base: Any) -> int | None:
        """How many tokens a sequence may have for student and teacher; None where nothing bounds it."""
        return min([most for most in (self.positions, most_positions(base)) if most is not None], default=None)

    def _source(self, coin: float, progress: float, device: torch.device) -> str:
        if coin >= self.fraction:
            return DATA
        if not self.adaptive or coin < self.fraction * (1.0 - progress):
            return GENERATED
        # Of all ranks, as a rank that writes while others do not would wait for them in FSDP.
        return GENERATED if most_of_ranks(self.replay_size - len(self._buffer), device) else REPLAYED

    def _written(self, model: nn.Module, batch: Mapping[str, Tensor], seed: int, synced: bool) -> list[_Row] | None:
        """The rows, continued by the student from their prompts; None where none was."""
        rows = _unpadded(batch)
        positions = self._positions(unwrapped(model))
        prompts = {place: row.tokens[: _prompt(row.labels)] for place, row in enumerate(rows)}
        fits = {
            place: prompt
            for place, prompt in prompts.items()
            if len(prompt) and (positions is None or len(prompt) + self.max_new_tokens <= positions)
        }
        answers = responses(
            model,
            list(fits.values()),
            self.sampling,
            vocab_size=self.vocab_size,
            seed=seed,
            device=batch["input_ids"].device,
            synced=synced,
        )
        for (place, prompt), response in zip(fits.items(), answers, strict=True):
            written = _Written(torch.cat([prompt, response]).int(), len(prompt))
            rows[place] = written.row()
            if self.adaptive:
                self._buffer.append(written)
        return rows if fits else None

    def _collated(self, rows: list[_Row], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ids, labels = like["input_ids"], like["labels"]
        mask = like.get("attention_mask", ids)
        return {
            "input_ids": pad_sequence([row.tokens for row in rows], batch_first=True, padding_value=self.pad).to(ids),
            "attention_mask": pad_sequence([torch.ones_like(row.tokens) for row in rows], batch_first=True).to(mask),
            "labels": pad_sequence([row.labels for row in rows], batch_first=True, padding_value=IGNORED).to(labels),
        }


def _checked(batch: Any) -> int:
    """The number of rows."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch is a mapping of {', '.join(KEYS)} to tensors, got {type(batch).__name__}")
    if unknown := [str(key) for key in batch if key not in KEYS]:
        raise ValueError(
            f"batch has {', '.join(unknown)}, which would not fit text that the student writes; accepted: {', '.join(KEYS)}"
        )
    for name in ("input_ids", "labels"):
        if name not in batch:
            raise ValueError(f"batch has no {name}; accepted: input_ids and labels, with or without attention_mask")
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"batch[{name!r}] is a tensor, got {type(value).__name__}")
        if value.dim() != 2 or value.shape != batch["input_ids"].shape or 0 in value.shape:
            shapes = {key: tuple(one.shape) for key, one in batch.items() if isinstance(one, Tensor)}
            raise ValueError(f"batch has tensors of one shape (B, S), neither of them 0, got {shapes}")
    return len(batch["input_ids"])


def _unpadded(batch: Mapping[str, Tensor]) -> list[_Row]:
    ids, labels = batch["input_ids"].cpu().long(), batch["labels"].cpu().long()
    kept = batch["attention_mask"].cpu() != 0 if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
    return [_Row(tokens[keep], label[keep]) for tokens, label, keep in zip(ids, labels, kept, strict=True)]


def _prompt(labels: Tensor) -> int:
    """How many of a row's first tokens are its prompt; 0 for a row that has nothing to learn. labels: (n,)."""
    counts = (labels != IGNORED).nonzero().flatten().tolist()
    if not counts:
        return 0
    first, last = int(counts[0]), int(counts[-1])
    return first or max(1, (last + 1) // 2)


def _key(purpose: str, *counters: int) -> int:
    """63 bits that differ wherever the purpose or a counter does."""
    return int.from_bytes(hashlib.blake2b(repr((purpose, *counters)).encode(), digest_size=8).digest(), "big") >> 1


def _uniform(purpose: str, *counters: int) -> float:
    """A number in [0, 1)."""
    return (_key(purpose, *counters) >> 10) * 2.0**-53
