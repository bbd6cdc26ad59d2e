"""The command line: ``python -m kdkernels COMMAND``.

Each command is a function that adds its own parser, with ``run`` set to what carries it out; ``COMMANDS`` lists them. What a
command needs is imported when it runs, so that ``--help`` is quick and works without the optional libraries.

Exit status: 0 done, 2 bad input or a damaged file, 130 interrupted.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kdkernels.demo.settings import DEFAULT_MINUTES, DemoError, Settings, require_libraries

INTERRUPTED = 130
BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kdkernels",
        description="Distillation losses for language models with large vocabularies.",
        epilog="examples:\n  python -m kdkernels info\n  python -m kdkernels demo --minutes 1\n  python -m kdkernels demo --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"\ninterrupted; {arguments.interrupted}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="versions, backends, instruction set", description=_info.__doc__)
    parser.set_defaults(run=_info, interrupted="nothing was changed")


def _info(arguments: argparse.Namespace) -> None:
    """Print versions, the processor, the backend per device, the instruction sets and the divergences."""
    from kdkernels import info

    print(info.text())


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="distil a small model on real text, in a few minutes on a CPU",
        description="Learn a vocabulary on the Python sources of this interpreter, train a small Llama-style teacher, and\n"
        "distil a smaller student three ways: cross-entropy alone, forward KL, TAID. Prints held-out losses, and the time\n"
        "and memory of a loss step against eager PyTorch; writes them with a plot into a folder.",
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
    parser.set_defaults(run=_demo, interrupted="the same command with --resume continues from the last checkpoint")


def _demo(arguments: argparse.Namespace) -> None:
    require_libraries()
    from kdkernels.demo.run import run

    run(Settings(minutes=arguments.minutes, seed=arguments.seed), arguments.out, resume=arguments.resume)


def _number(kind: Callable[[str], Any], accepted: str, allowed: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type; argparse puts the argument's name before the text of its error."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise argparse.ArgumentTypeError(f"got {text!r}; accepted: {accepted}")
        return value

    return read


COMMANDS: tuple[Callable[[Any], None], ...] = (_add_info, _add_demo)
