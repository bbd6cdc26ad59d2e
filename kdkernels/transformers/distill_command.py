"""``python -m kdkernels distill``: its options, on the command line and in a configuration file.

An option is stated once, in ``OPTIONS``. The command line's parser and the reader of configuration files are both made from that,
so that they have the same names and defaults, and refuse the same values. The run itself is in kdkernels.transformers.distill.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdkernels.console.arguments import MEMORY, how_to_go_on, memory, number
from kdkernels.divergences import divergences
from kdkernels.errors import CommandError, to_install

LIBRARIES = ("accelerate", "rich", "safetensors", "transformers")
TAID, OKD = "taid", "okd"


@dataclass(frozen=True)
class Kind:
    """What an option's value is. accepted: in words; types: in a configuration file; parse, allowed: of the command line's text."""

    accepted: str
    types: tuple[type, ...]
    parse: Callable[[Any], Any] = str
    allowed: Callable[[Any], bool] = lambda value: True
    names: tuple[str, ...] = ()  # where it is one of these

    def of_text(self) -> Callable[[str], Any]:
        """For argparse."""
        return number(self.parse, self.accepted, self.allowed)

    def of_value(self, value: Any) -> Any:
        """What a configuration file has, or a ValueError. YAML reads 1e-4, which has no dot, as text: as a number it is meant."""
        if float in self.types and isinstance(value, str):
            value = self.parse(value)
        if not isinstance(value, self.types) or (isinstance(value, bool) and bool not in self.types) or not self.allowed(value):
            raise ValueError
        return self.parse(value) if float in self.types else value


def _integer(least: int, most: int = 2**40) -> Kind:
    return Kind(f"an integer from {least} on", (int,), int, lambda value: least <= value <= most)


def _between(accepted: str, allowed: Callable[[float], bool]) -> Kind:
    return Kind(accepted, (int, float), float, lambda value: math.isfinite(value) and allowed(value))


def _one_of(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", (str,), allowed=lambda value: value in names, names=names)


TEXT = Kind("text", (str,), allowed=bool)
SWITCH = Kind("true or false", (bool,))
POSITIVE = _between("a positive number", lambda value: value > 0)
TEMPERATURE = _between("a positive number from 1e-9 to 1e5", lambda value: 1e-9 <= value <= 1e5)
NOT_NEGATIVE = _between("a number of at least 0", lambda value: value >= 0)
SHARE = _between("a number from 0 to 1", lambda value: 0 <= value <= 1)
PART = _between("a number from 0, below 1", lambda value: 0 <= value < 1)
NUMBER = _between("a number", lambda value: True)
COUNT = _integer(1)
BYTES = Kind(MEMORY, (int, float), memory)

SOURCES = "a text, .jsonl or .json file, a folder of datasets, or a name that datasets knows"
ADAPTIVE = "the fraction grows when an evaluation finds no gain, and what was written is used again (DistiLLM)"


@dataclass(frozen=True)
class Option:
    """name: with underscores, as in a configuration file. default: None where it has none, or where ``help`` says what it is.
    needs: the method that it is of, if it is of one only."""

    name: str
    kind: Kind
    metavar: str
    help: str
    default: Any = None
    needs: str | None = None

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def shown(self) -> str:
        """In --help, as argparse shows choices."""
        return f"{{{','.join(self.kind.names)}}}" if self.kind.names else self.metavar


OPTIONS: dict[str, tuple[Option, ...]] = {
    "models": (
        Option(
            "teacher", TEXT, "MODEL", "a folder that save_pretrained wrote, a name of the hub, or a folder of the cache command"
        ),
        Option("student", TEXT, "MODEL", "a folder that save_pretrained wrote, or a name of the hub"),
        Option("out", TEXT, "FOLDER", "for the student and checkpoints: a new folder, or with --resume that of an earlier run"),
        Option("dtype", _one_of("auto", "float32", "bfloat16"), "NAME", "of the student's weights; auto: as saved", "float32"),
        Option("teacher_dtype", _one_of("auto", "float32", "bfloat16", "float16"), "NAME", "of the teacher's weights", "auto"),
        Option("bf16", SWITCH, "", "compute in bfloat16 from float32 weights (autocast)", False),
        Option("gradient_checkpointing", SWITCH, "", "compute activations twice instead of keeping them", False),
    ),
    "data": (
        Option("data", TEXT, "DATA", f"{SOURCES} (with a cached teacher: the examples of the cache)"),
        Option("split", TEXT, "NAME", "of the data", "train"),
        Option("limit", COUNT, "N", "use the first N examples (default: all)"),
        Option("max_length", _integer(2), "L", "tokens of an example: texts become windows, the rest is cut", 512),
        Option("eval_data", TEXT, "DATA", "held-out data, like --data (default: a part of --data)"),
        Option("eval_split", TEXT, "NAME", "of the held-out data (default: as --split)"),
        Option("eval_fraction", PART, "PART", "of the examples, held out at their end where there is no --eval-data", 0.05),
    ),
    "method": (
        Option("method", _one_of(*divergences(), TAID, OKD), "NAME", f"a divergence, {TAID} or {OKD}"),
        Option("divergence", _one_of(*divergences()), "NAME", f"of {TAID} and {OKD} (default: forward_kl)"),
        Option("divergence_parameter", NUMBER, "X", "beta of jsd, alpha of the skew divergences"),
        Option("temperature", TEMPERATURE, "T", "divides both models' logits in the divergence", 1.0),
        Option("kd_weight", NOT_NEGATIVE, "W", "factor of the divergence", 1.0),
        Option("ce_weight", NOT_NEGATIVE, "W", "factor of the labels' cross-entropy", 0.0),
        Option("taid_t_start", SHARE, "t", "the teacher's share in the target at the start (default: 0.4)", needs=TAID),
        Option("lora_rank", COUNT, "R", "of the LoRA that lets the teacher adapt (default: 32)", needs=OKD),
        Option("teacher_learning_rate", NOT_NEGATIVE, "RATE", "of that LoRA (default: the student's)", needs=OKD),
        Option("teacher_alpha", SHARE, "A", "KL to the student in the teacher's loss; the rest is CE (default: 0.5)", needs=OKD),
        Option("save_teacher", SWITCH, "", "save the LoRA too, in OUT/student/teacher", needs=OKD),
        Option("on_policy_fraction", SHARE, "PART", "of the batches that the student writes itself (GKD)", 0.0),
        Option("on_policy_schedule", _one_of("constant", "adaptive"), "NAME", f"adaptive: {ADAPTIVE}", "constant"),
        Option("max_new_tokens", COUNT, "N", "most tokens that the student writes", 128),
        Option("topk_tail", _one_of("bucket", "renormalize"), "NAME", "with a cached teacher: what stands for the rest", "bucket"),
        Option("vocab_size", COUNT, "V", "compare the first V tokens; other names there are confirmed (default: what both know)"),
        Option("memory_budget", BYTES, "BYTES", "for the loss's logits of both models (default: what the loss itself takes)"),
    ),
    "training": (
        Option("steps", COUNT, "N", "optimizer steps (default: --epochs)"),
        Option("epochs", POSITIVE, "N", "passes over the data (default: 1)"),
        Option("batch_size", COUNT, "B", "examples in a forward, on each device", 8),
        Option("gradient_accumulation", COUNT, "N", "forwards in a step", 1),
        Option("learning_rate", NOT_NEGATIVE, "RATE", "highest of the run, of AdamW", 1e-4),
        Option("warmup", NOT_NEGATIVE, "N", "steps in which the rate rises; below 1: a part of the run", 0.03),
        Option("schedule", _one_of("cosine", "linear", "constant"), "NAME", "of the rate, after the warm-up", "cosine"),
        Option("weight_decay", NOT_NEGATIVE, "W", "of AdamW", 0.0),
        Option("seed", _integer(0, 2**31 - 1), "N", "of the order of the data, dropout, LoRA and sampling", 0),
        Option("save_steps", COUNT, "N", "steps between checkpoints, of which the last is kept (default: a tenth of the run)"),
        Option("eval_steps", COUNT, "N", "steps between evaluations (default: only before the first step and after the last)"),
        Option("logging_steps", COUNT, "N", "steps between reports of the loss", 10),
        Option(
            "report_to", TEXT, "NAME[,NAME]", "send the log to tensorboard, wandb or what else transformers knows, or all", "none"
        ),
    ),
}
BY_NAME = {option.name: option for group in OPTIONS.values() for option in group}
REQUIRED = ("teacher", "student", "out", "method")
# the first of a pair that is given on the command line stands against the other from a file
EXCLUDING = (("steps", "epochs"), ("eval_data", "eval_fraction"))
# may differ between a run and its resumption, without a difference to the student
FREE = ("out", "save_steps", "logging_steps", "report_to", "memory_budget")
RUN = "run.json"


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
            ending = "" if option.default is None or option.kind is SWITCH else f" (default: {_shown(option.default)})"
            more: dict[str, Any] = (
                {"action": argparse.BooleanOptionalAction}
                if option.kind is SWITCH
                else {"type": option.kind.of_text(), "metavar": option.shown}
            )
            text = (option.help + ending).replace("%", "%%")
            # without a default: what is not given is not there, so that a configuration file can be asked for it
            group.add_argument(option.flag, default=argparse.SUPPRESS, help=text, **more)
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

    from kdkernels.transformers.distill import distill

    distill(settings, resume=arguments.resume)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()  # its threads, still running when the process ends, can abort it after all is done


def read_config(path: Path) -> dict[str, Any]:
    """The options of a YAML or JSON file, checked; names may have dashes or underscores, and a value of null is none.

    Raises CommandError that names the file and the option: not known (with the nearest that is), given twice, or of a wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise CommandError(f"--config {path} cannot be read: {reason}") from error
    content = _parsed(text, path)
    if not isinstance(content, Mapping):
        raise CommandError(
            f"--config {path} holds no names with values; accepted: for example {{'teacher': 'folder', 'steps': 100}}"
        )
    if "settings" in content and path.name in (RUN, "results.json"):
        raise CommandError(f"--config {path} is what a run has written; to go on with that: --resume --out {path.parent}")
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in BY_NAME:
            near = difflib.get_close_matches(name, BY_NAME, n=1, cutoff=0.0)[0]
            raise CommandError(f"--config {path}: {key!r} is not known; the nearest is {near}")
        if name in found:
            raise CommandError(f"--config {path}: {name} is there twice")
        if value is None:
            continue
        found[name] = _taken(name, value, f"--config {path}: {key}")
    return found


def _taken(name: str, value: Any, where: str) -> Any:
    """A value of a file, for an option."""
    try:
        return BY_NAME[name].kind.of_value(value)
    except ValueError as error:
        raise CommandError(f"{where} is {value!r}; accepted: {BY_NAME[name].kind.accepted}") from error


def recorded(out: Path) -> dict[str, Any]:
    """The options of the run in a folder that --resume is to go on with; none where it was cut off before it had written them.

    Raises CommandError where there is no such run.
    """
    accepted = "accepted: the --out of an earlier run, or the same command without --resume, which begins one"
    if not out.exists():
        raise CommandError(f"--resume: there is no folder {out}; {accepted}")
    if not (out / "kdkernels-distill.json").is_file():
        whole = out.absolute().parent
        hint = f"; the run that it is a part of is in {whole}" if (whole / "kdkernels-distill.json").is_file() else ""
        raise CommandError(f"--resume: {out} holds no run of distill{hint}; {accepted}")
    if not (out / RUN).exists() and not (out / "results.json").exists() and not any(out.glob("checkpoint-*")):
        return {}
    found = read_run(out)["settings"]
    given = {name: value for name, value in found.items() if name in BY_NAME and value is not None}
    return {name: _taken(name, value, f"{out / RUN}: {name}") for name, value in given.items()}


def read_run(out: Path) -> dict[str, Any]:
    """run.json, with "settings", "data" and "before" at least."""
    try:
        found = json.loads((out / RUN).read_bytes())
        if not isinstance(found["settings"], dict):
            raise TypeError("its settings are none")
        return {"before": None, "data": None, **found}
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise CommandError(
            f"{out / RUN}, which says what the run was, cannot be read ({reason}); accepted: another --out"
        ) from error


def merged(given: Mapping[str, Any], configured: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> argparse.Namespace:
    """All options: from the command line, else from the file, else as they were ``before`` in a run that is resumed, else defaults.

    Raises CommandError where one is missing, two exclude each other, or one belongs to another method.
    """
    lost = " (the run was cut off before it had kept its own)" if before is not None and not before else ""
    configured, before = dict(configured), dict(before or {})
    for pair in EXCLUDING:
        for name, other in (pair, pair[::-1]):
            if name in given:
                configured.pop(other, None)
            if name in given or name in configured:
                before.pop(other, None)
    chosen = {**configured, **given}
    for name in REQUIRED:
        if name not in chosen and name not in before:
            raise CommandError(f"{BY_NAME[name].flag} is required, on the command line or in the file of --config{lost}")
    for first, second in EXCLUDING:
        if first in chosen and second in chosen:
            raise CommandError(f"{BY_NAME[first].flag} and {BY_NAME[second].flag} exclude each other; give one of them")
    for name in chosen:
        needs = BY_NAME[name].needs
        method = chosen.get("method", before.get("method"))
        if needs is not None and method != needs:
            raise CommandError(f"{BY_NAME[name].flag} is of method {needs}; the method is {method}")
    defaults = {name: option.default for name, option in BY_NAME.items()}
    return argparse.Namespace(**{**defaults, **before, **chosen})


def _parsed(text: str, path: Path) -> Any:
    def paired(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_once([name for name, _ in pairs], path)
        return dict(pairs)

    if path.suffix == ".json":
        try:
            return json.loads(text, object_pairs_hook=paired)
        except CommandError:
            raise
        except ValueError as error:
            raise CommandError(f"--config {path} is not JSON: {error}") from error
    import yaml  # type: ignore[import-untyped]  # comes with transformers

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if isinstance(node, yaml.MappingNode):
            _check_once([key.value for key, _ in node.value], path)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CommandError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error


def _check_once(names: Sequence[Any], path: Path) -> None:
    """Both readers would take the last of two values of one name, and say nothing."""
    for name in names:
        if names.count(name) > 1:
            raise CommandError(f"--config {path}: {name} is there twice")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
