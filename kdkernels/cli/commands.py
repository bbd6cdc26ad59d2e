"""The command line: ``python -m kdkernels COMMAND``.

Each command is a function that adds its own parser, with ``run`` set to what carries it out; ``COMMANDS`` lists them. What a
command needs is imported when it runs, so that ``--help`` is quick and works without the optional libraries.

Exit status: 0 done, 2 bad input or a damaged file, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kdkernels as kd
from kdkernels.cli.models import HEADS
from kdkernels.console.arguments import MEMORY, Parser, drop_output, how_to_go_on, memory
from kdkernels.console.arguments import checked as _checked
from kdkernels.console.arguments import number as _number
from kdkernels.demo.settings import DEFAULT_MINUTES, Settings, require_libraries
from kdkernels.errors import CommandError
from kdkernels.planning.devices import DEVICES
from kdkernels.transformers import cache_command
from kdkernels.transformers.distill import command as distill_command

INTERRUPTED = 130
BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        return _ended(_status(argv))
    except SystemExit as stop:  # argparse's own way out, after --help or an error
        raise SystemExit(_ended(int(stop.code or 0))) from None
    except KeyboardInterrupt:  # before the command began, or a second one while it ended
        return _refuse("nothing more was written", INTERRUPTED, "\ninterrupted; ")


def _ended(status: int) -> int:
    """The exit status, once all that was printed is out; at the interpreter's end it could only be a traceback."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        drop_output()
        if not status and not isinstance(error, BrokenPipeError):
            return _refuse(f"standard output cannot be written: {error.strerror}")
    return status


def _refuse(reason: str, status: int = BAD_INPUT, before: str = "error: ") -> int:
    with contextlib.suppress(BrokenPipeError):
        print(f"{before}{reason}", file=sys.stderr)
    return status


def _status(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m kdkernels",
        description="Distillation losses for language models with large vocabularies.",
        epilog="examples:\n  python -m kdkernels info\n"
        "  python -m kdkernels plan --student Qwen2.5-0.5B --teacher Qwen2.5-7B --tokens 8192\n"
        "  python -m kdkernels demo --minutes 1\n  python -m kdkernels demo --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kdkernels {kd.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except CommandError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        then = arguments.interrupted
        return _refuse(then if isinstance(then, str) else then(arguments), INTERRUPTED, "\ninterrupted; ")
    except BrokenPipeError:
        drop_output()
    except OSError as error:  # of a disk or a network, which no command has told better
        return _refuse(" ".join(str(error).split()))
    return 0


def _add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="versions, backends, instruction set", description=_info.__doc__)
    parser.set_defaults(run=_info, interrupted="nothing was changed")


def _info(arguments: argparse.Namespace) -> None:
    """Print versions, the processor, the backend per device, the instruction sets and the divergences."""
    from kdkernels.console import info

    try:
        print(info.text())
    except ValueError as error:  # of a variable in the environment
        raise CommandError(str(error)) from error


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="what a loss step will take in memory and time, predicted for a device",
        description="Peak memory and time of one step, loss and gradients, from hidden states and heads: eager PyTorch beside\n"
        "this library's strategies. Nothing is run: memory comes from the plan, time from a roofline of the datasheet.",
        epilog="examples:\n  python -m kdkernels plan --student Qwen2.5-0.5B --teacher Qwen2.5-7B --tokens 8192\n"
        "  python -m kdkernels plan --student ./student --teacher Qwen/Qwen3-8B --tokens 8192 --memory-budget 1GB --json\n"
        "  python -m kdkernels plan --student 32000x512 --teacher 32000x1024 --tokens 4096 --dtype float32 --device cpu\n\n"
        + textwrap.fill(f"models known by name: {', '.join(HEADS)}", 100, break_on_hyphens=False),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = "a folder with config.json, a name of the hub or of the table, or sizes VxD (vocabulary x hidden) such as 151936x896"
    parser.add_argument("--student", type=_checked(_head_shape), required=True, metavar="MODEL", help=f"its head: {model}")
    parser.add_argument("--teacher", type=_checked(_head_shape), required=True, metavar="MODEL", help="its head, named likewise")
    count = _number(int, "an integer from 1 to 2**40", lambda value: 1 <= value <= 2**40)
    parser.add_argument("--tokens", type=count, required=True, metavar="N", help="tokens that count in a step")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of hidden states and heads (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        type=_checked(_device_name),
        default="H100",
        metavar="DEVICE",
        help=f"{', '.join(DEVICES)}, or cpu: this one, measured (default: %(default)s)",
    )
    parser.add_argument(
        "--divergence", type=_checked(_divergence), default="forward_kl", metavar="NAME", help="of the loss (default: %(default)s)"
    )
    parser.add_argument(
        "--memory-budget",
        type=_number(memory, MEMORY, lambda value: True),
        metavar="BYTES",
        help="for the scratch of both models' logits, such as 512MiB or 1GB (default: what the loss itself takes)",
    )
    parser.add_argument(
        "--vocab-size", type=count, metavar="V", help="cut both heads to their first V rows (default: to those that both have)"
    )
    parser.add_argument("--frozen-head", action="store_true", help="the student's head takes no gradient")
    parser.add_argument("--okd", action="store_true", help="the teacher learns too, its head frozen (kd.linear_okd_loss)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: the inputs, and what is predicted of each way")
    parser.set_defaults(run=_plan, interrupted="nothing was changed")


def _plan(arguments: argparse.Namespace) -> None:
    import torch

    from kdkernels.cli import compare, configs, models
    from kdkernels.planning import devices

    student, teacher = arguments.student, arguments.teacher
    both, dtype = min(student.vocab, teacher.vocab), getattr(torch, arguments.dtype)
    vocab = arguments.vocab_size or both
    if vocab > both:
        raise CommandError(f"--vocab-size is {vocab:,}; accepted: up to {both:,}, the rows that both heads have")
    try:
        compared = configs.check_tokenizers(student, teacher, arguments.vocab_size)
    except ValueError as error:
        raise CommandError(
            f"--student {student.name} cannot learn from --teacher {teacher.name}: {error}. Distillation compares distributions "
            "over one vocabulary, token by token. Sizes are planned all the same: "
            f"--student {student.sizes} --teacher {teacher.sizes}"
        ) from error
    on = devices.device(arguments.device)
    try:
        ways = compare.compare(
            arguments.tokens,
            vocab,
            student.dim,
            teacher.dim,
            dtype,
            on=on,
            divergence=arguments.divergence,
            memory_budget=arguments.memory_budget,
            train_head=not arguments.frozen_head,
            online_teacher=arguments.okd,
        )
    except ValueError as error:  # of a variable in the environment
        raise CommandError(str(error)) from error
    if arguments.json:
        predicted = {way.name: way.figures(on) for way in ways}
        (auto,) = (way.name for way in ways if way.auto)
        print(json.dumps({"inputs": _inputs(arguments, vocab, compared), "predicted": predicted, "auto": auto}))
        return
    head = ", frozen head" if arguments.frozen_head else ""
    loss = f"OKD with {arguments.divergence}, losses" if arguments.okd else f"{arguments.divergence}, loss"
    print(f"{loss} and gradients of {arguments.tokens:,} tokens, {arguments.dtype}{head}")
    print(f"vocabulary {vocab:,}, hidden {student.dim:,} (student) and {teacher.dim:,} (teacher), on {on.name}")
    if not student.vocab == teacher.vocab == vocab:
        print(f"heads of {student.vocab:,} and {teacher.vocab:,} rows: planned for vocab_size={vocab}")
    if not compared and not models.SIZES.fullmatch(student.name) and not models.SIZES.fullmatch(teacher.name):
        print("tokenizers: not compared, since what is here does not say that they are one")
    print()
    print(compare.table(ways, on))


def _inputs(arguments: argparse.Namespace, vocab: int, compared: bool) -> dict[str, Any]:
    """What a plan was made for, as JSON has it."""
    models = {
        side: {"name": head.name, "vocab": head.vocab, "hidden": head.dim, "tokenizer": head.tokenizer or None}
        for side, head in (("student", arguments.student), ("teacher", arguments.teacher))
    }
    names = ("tokens", "dtype", "device", "divergence", "memory_budget", "frozen_head", "okd")
    given = {name: getattr(arguments, name) for name in names}
    return {**models, "vocab_size": vocab, "one_tokenizer": True if compared else None, **given}


def _head_shape(text: str) -> Any:
    from kdkernels.cli.configs import head_shape

    return head_shape(text)


def _device_name(text: str) -> str:
    from kdkernels.planning.devices import check_name

    return check_name(text)


def _divergence(text: str) -> str:
    from kdkernels.planning.roofline import check_divergence

    return check_divergence(text)


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="distil a small model on real text, in a few minutes on a CPU",
        description="Learn a vocabulary on the Python sources of this interpreter, train a small Llama-style teacher and a\n"
        "smaller student, and let the student go on in four ways: cross-entropy, forward KL, TAID, OKD. Prints held-out\n"
        "losses, what each model writes, and the time and memory of a loss step against eager PyTorch; writes them with\n"
        "a plot and the models into a folder, and ends with a command that takes these models.",
        epilog="examples:\n  python -m kdkernels demo\n  python -m kdkernels demo --minutes 20 --out /tmp/demo\n"
        "  python -m kdkernels demo --resume        after Ctrl-C",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="FOLDER",
        help="where results, caches and checkpoints go: a new folder, or one of an earlier demo (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=_number(float, "a number of minutes of at least 0.1", lambda value: 0.1 <= value < math.inf),
        default=DEFAULT_MINUTES,
        help="length of the run on 2 cores, which it stays below; scales the steps (default: %(default)g)",
    )
    parser.add_argument(
        "--seed",
        type=_number(int, "an integer from 0 to 2**31 - 1", lambda value: 0 <= value < 2**31),
        default=0,
        help="of the models and the batches (default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run from its last checkpoint")
    parser.set_defaults(run=_demo, interrupted=lambda arguments: how_to_go_on(arguments.out, "demo"))


def _demo(arguments: argparse.Namespace) -> None:
    require_libraries()
    from kdkernels.demo.run import run

    run(Settings(minutes=arguments.minutes, seed=arguments.seed), arguments.out, resume=arguments.resume)


COMMANDS: tuple[Callable[[Any], None], ...] = (_add_info, _add_plan, _add_demo, cache_command.add, distill_command.add)
