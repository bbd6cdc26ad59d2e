"""``python -m kdkernels cache``: run a teacher over data once, and keep what a student learns from."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kdkernels.console.arguments import number
from kdkernels.errors import CommandError, to_install

LIBRARIES = ("rich", "safetensors", "transformers")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "cache",
        help="keep a teacher's most likely tokens on disk, to distil without the teacher",
        description="Run a teacher over data once and write the log-probabilities of its most likely tokens into a folder, which\n"
        "takes the teacher's place in distillation. The same command again goes on where an earlier one was interrupted.",
        epilog="examples:\n"
        "  python -m kdkernels cache --teacher Qwen/Qwen2.5-7B-Instruct --data chats.jsonl --out cache\n"
        "  python -m kdkernels cache --teacher ./teacher --data HuggingFaceH4/ultrachat_200k --split train_sft --limit 10000 \\\n"
        "      --max-length 1024 --top-k 128 --dtype bfloat16 --out cache",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--teacher", required=True, metavar="MODEL", help="a folder that save_pretrained wrote, or a name of the hub"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="a .jsonl, .json or text file, a folder of datasets, or a name that datasets knows",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where the cache goes: a new folder, or the one of an earlier run"
    )
    count = number(int, "an integer of at least 1", lambda value: value >= 1)
    parser.add_argument("--top-k", type=count, default=64, metavar="K", help="entries for each token (default: %(default)s)")
    parser.add_argument(
        "--temperature",
        type=number(float, "a positive number from 1e-9 to 1e5", lambda value: 1e-9 <= value <= 1e5),
        default=1.0,
        metavar="T",
        help="of the teacher's softmax, which the student is then trained with (default: %(default)g)",
    )
    parser.add_argument(
        "--vocab-size",
        type=count,
        metavar="V",
        help="leave out rows of the teacher's head after the first V, which pad it (default: keep all)",
    )
    parser.add_argument(
        "--max-length",
        type=number(int, "an integer of at least 2", lambda value: value >= 2),
        default=512,
        metavar="L",
        help="tokens of an example; longer ones are cut (default: %(default)s)",
    )
    parser.add_argument("--split", default="train", metavar="NAME", help="of the data (default: %(default)s)")
    parser.add_argument("--limit", type=count, metavar="N", help="use the first N examples (default: all)")
    parser.add_argument("--batch-size", type=count, default=8, metavar="B", help="examples in a forward (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the teacher's weights (default: as they were saved)",
    )
    parser.set_defaults(run=_run, interrupted="the same command again goes on after the last whole shard")


def _run(arguments: argparse.Namespace) -> None:
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"the cache needs {', '.join(missing)}, not installed here: {to_install('transformers')}")
    from kdkernels.console import files, terminal
    from kdkernels.transformers.cache import TOKENIZER, write_cache
    from kdkernels.transformers.data import prepare
    from kdkernels.transformers.load import load_model, load_tokenizer

    console = terminal.Output()
    say = partial(terminal.say, console)

    tokenizer = load_tokenizer(arguments.teacher)
    about = {
        "teacher": _name(arguments.teacher),
        "data": _name(arguments.data),
        "split": arguments.split,
        "limit": arguments.limit,
        "max_length": arguments.max_length,
        "tokenizer_digest": _tokenizer_digest(tokenizer),
    }
    data = prepare(arguments.data, tokenizer, max_length=arguments.max_length, split=arguments.split, limit=arguments.limit)
    if left_out := data.left_out(arguments.max_length):
        say(left_out)
    for note in data.notes:
        say(note)
    files.claim(arguments.out, "cache")  # before the teacher is loaded, which can take long
    model = load_model(arguments.teacher, dtype=arguments.dtype)
    _check_length(model, max(len(example["input_ids"]) for example in data.examples))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with (
            files.writing(arguments.out, "with room the same command again goes on after the last whole shard"),
            _Progress(console, say) as progress,
        ):
            cache = write_cache(
                model,
                data.examples,
                arguments.out,
                top_k=arguments.top_k,
                temperature=arguments.temperature,
                vocab_size=arguments.vocab_size,
                batch_size=arguments.batch_size,
                about=about,
                progress=progress,
            )
            # By it KDTrainer sees whether a student's tokens are the same.
            tokenizer.save_pretrained(arguments.out / TOKENIZER)
    except (ValueError, TypeError) as error:
        raise CommandError(" ".join(str(error).split())) from error
    except torch.OutOfMemoryError as error:
        raise CommandError("the teacher does not fit the GPU's memory: try a smaller --batch-size or --max-length") from error
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    say(
        f"{len(cache):,} examples, {cache.tokens:,} tokens, {size:,} bytes in {arguments.out}/; of the probability, "
        f"{cache.tail_mass:.4f} is outside the top {cache.top_k} on average"
    )


class _Progress:
    """A bar on a terminal; elsewhere only a line where an earlier run is gone on with."""

    def __init__(self, console: Any, say: Any) -> None:
        from kdkernels.console import terminal

        self.bar = terminal.Bar(console)
        self.task, self.say = self.bar.add_task("examples", total=None), say
        self.begun = False

    def __enter__(self) -> Any:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if done and not self.begun:
            self.say(f"{done:,} of {total:,} examples were there from an earlier run")
        self.begun = True
        self.bar.update(self.task, completed=done, total=total)


def _name(name_or_path: str) -> str:
    """Without the path, so that a cache says the same wherever it was made."""
    path = Path(name_or_path).expanduser()
    return path.resolve().name if path.exists() else name_or_path


def _tokenizer_digest(tokenizer: Any) -> str:
    text = f"{tokenizer.backend_tokenizer.to_str()}{tokenizer.chat_template}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _check_length(model: Any, longest: int) -> None:
    from kdkernels.transformers.batches.reading import most_positions

    most = most_positions(model)
    if most is not None and longest > most:
        raise CommandError(
            f"the longest example has {longest} tokens, and the teacher takes {most}; accepted: --max-length up to {most}"
        )
