"""``python -m kdkernels distill``: its parser. The run itself is in run.py, which needs transformers."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from kdkernels.console.arguments import how_to_go_on
from kdkernels.errors import CommandError, to_install
from kdkernels.transformers.distill.configuration import merged, read_config, recorded
from kdkernels.transformers.distill.options import BY_NAME, OPTIONS
from kdkernels.transformers.settings import SWITCH

LIBRARIES = ("accelerate", "rich", "safetensors", "transformers")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "distill",
        usage="python -m kdkernels distill --teacher MODEL --student MODEL --data DATA --method NAME --out FOLDER [OPTION ...]",
        help="train a student on a teacher, models and data given by name",
        description="Train a student on a teacher's distributions: any divergence, TAID, OKD, with the student's own writing or\n"
        "with a cached teacher. Writes the student with its tokenizer into OUT/student, and checkpoints into OUT.",
        epilog="examples:\n"
        "  python -m kdkernels distill --teacher Qwen/Qwen2.5-1.5B --student Qwen/Qwen2.5-0.5B --data notes.txt \\\n"
        "      --method taid --out run\n"
        "  python -m kdkernels distill --teacher ./teacher --student ./student --data chats.jsonl --eval-data heldout.jsonl \\\n"
        "      --method okd --lora-rank 16 --steps 1000 --bf16 --out run\n"
        "  python -m kdkernels distill --teacher cache --student ./student --method forward_kl --epochs 3 --out run\n"
        "  python -m kdkernels distill --config run.yaml --learning-rate 5e-5 --out run2\n"
        "  python -m kdkernels distill --resume --out run       after Ctrl-C: the rest is as the run has it\n\n"
        "A configuration file is YAML, or JSON where its name ends in .json: the names of the options, and their values.\n"
        'In .jsonl and .json data a record has "text", or "messages" (and "tools"), or "prompt" and "completion"; with\n'
        "--on-policy-fraction 1, where the student answers every prompt itself, a prompt may stand alone.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="options from a file; those on the command line come first")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for option in options:
            more: dict[str, Any] = (
                {"action": argparse.BooleanOptionalAction}
                if option.kind is SWITCH
                else {"type": option.kind.of_text(), "metavar": option.shown}
            )
            # without a default: what is not given is not there, so that a configuration file can be asked for it
            group.add_argument(option.flag, default=argparse.SUPPRESS, help=option.told.replace("%", "%%"), **more)
    parser.set_defaults(run=_run, folder=None, interrupted=lambda arguments: how_to_go_on(arguments.folder, "distill"))


def _run(arguments: argparse.Namespace) -> None:
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"distill needs {', '.join(missing)}, not installed here: {to_install('transformers')}")
    given = {name: value for name, value in vars(arguments).items() if name in BY_NAME}
    configured = {} if arguments.config is None else read_config(arguments.config)
    out = given.get("out", configured.get("out"))
    settings = merged(given, configured, recorded(Path(out).expanduser()) if arguments.resume and out is not None else None)
    arguments.folder = Path(settings.out)
    import torch.distributed as dist

    from kdkernels.transformers.distill.run import distill

    distill(settings, resume=arguments.resume)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()  # its threads, still running when the process ends, can abort it after all is done
