"""The examples of a run, and what holds of them before the models are loaded."""

from __future__ import annotations

import argparse
import hashlib
import math
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from kdkernels.errors import CommandError
from kdkernels.transformers.batches.reading import most_positions
from kdkernels.transformers.cache import TOKENIZER, TopKCache
from kdkernels.transformers.data import Example, Prepared, prepare
from kdkernels.transformers.distill.errors import of_option, refused
from kdkernels.transformers.load import load_tokenizer
from kdkernels.transformers.vocabularies import Known


def examples_of(
    settings: argparse.Namespace, tokenizer: Any, cache: TopKCache | None, say: Callable[[str], None]
) -> tuple[Sequence[Example], Sequence[Example], int]:
    """The examples to learn from, those that are held out, and how long the longest prompt without a completion is (0: none)."""
    alone = settings.on_policy_fraction == 1.0 and cache is None  # then all that is asked of the data is its prompts
    theirs = settings.teacher if cache is None else cache.folder / TOKENIZER
    # A program may have made a cache without a tokenizer; then its height is all that is known.
    teacher = of_option("teacher", load_tokenizer, theirs) if cache is None or theirs.is_dir() else None
    with refused():
        known = Known(tokenizer, teacher, rows=None if cache is None else cache.vocab_size, vocab_size=settings.vocab_size)

    def read(option: str, source: str, split: str, limit: int | None, prompts: bool = False) -> Prepared:
        length = settings.max_length
        found: Prepared = of_option(
            option, prepare, source, tokenizer, max_length=length, split=split, limit=limit, prompts=prompts
        )
        if left_out := found.left_out(length):
            say(f"{source}: {left_out}")
        for note in found.notes:
            say(note)
        return found

    prompts: list[Example] = []
    if settings.data is not None:
        found = read("data", settings.data, settings.split, settings.limit, alone)
        train: Sequence[Example] = found.examples
        prompts = found.prompts
    elif cache is not None:
        train = cache.examples()[: settings.limit]
    else:
        raise CommandError("--data is required, on the command line or in the file of --config")
    if settings.eval_data is not None:
        held_out: Sequence[Example] = read("eval_data", settings.eval_data, settings.eval_split or settings.split, None).examples
    elif not train:
        held_out = []
        if settings.eval_fraction:
            say("prompts alone have no tokens to judge the student by: nothing is held out (--eval-data with completions would be)")
    else:
        count = math.ceil(settings.eval_fraction * len(train))
        if count >= len(train) + len(prompts):
            raise CommandError(
                f"--eval-fraction {settings.eval_fraction:g} of {len(train):,} examples leaves none to learn from; accepted: "
                "--eval-data, more data, a smaller --max-length, or --eval-fraction 0"
            )
        train, held_out = train[: len(train) - count], train[len(train) - count :]
    train = [*train, *prompts] if prompts else train
    if settings.eval_steps is not None and not held_out:
        raise CommandError("--eval-steps needs held-out data, and prompts alone are none; accepted: --eval-data with completions")
    first = "--data" if settings.data else f"the cache {settings.teacher}"
    for option, part in ((first, train), ("--eval-data" if settings.eval_data else first, held_out)):
        problem = known.problem(part)
        if problem is not None:
            raise CommandError(f"{option} has {problem}")
    return train, held_out, max((len(prompt["input_ids"]) - 1 for prompt in prompts), default=0)


def digest_of(*parts: Sequence[Example]) -> str:
    """Of the data, so that a run does not go on with other data."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        for example in part:
            for values in (example["input_ids"], example["labels"]):
                digest.update(len(values).to_bytes(8, "little") + array("q", values).tobytes())
        digest.update(b"end")
    return digest.hexdigest()


def check_length(name: str, model: Any, longest: int) -> None:
    most = most_positions(model)
    if most is not None and longest > most:
        raise CommandError(
            f"the longest example has {longest:,} tokens, and the {name} takes {most:,}; accepted: --max-length {most}"
        )


def check_answers(name: str, model: Any, prompt: int, answer: int) -> None:
    """Where a prompt has no completion to fall back on, the student's own has to fit."""
    most = most_positions(model)
    if prompt and most is not None and prompt + answer > most:
        raise CommandError(
            f"the longest prompt has {prompt:,} tokens, with --max-new-tokens {answer:,} more than the {most:,} that the {name} "
            "takes; accepted: fewer of them, or a smaller --max-length, which leaves out longer prompts"
        )
