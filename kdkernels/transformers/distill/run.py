"""The run behind ``python -m kdkernels distill``: from names of models and data to a trained student.

The output folder holds

- kdkernels-distill.json: the marker by which the folder is known;
- run.json: settings and a digest of the data, written before the models are loaded, and later the held-out metrics of the
  untrained student;
- checkpoint-N: the Trainer's; student: the trained model with its tokenizer; loss.png: a plot of the run;
- results.json: what the final table shows. It is written last: where it is, the run is finished.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from kdkernels.console import files, terminal
from kdkernels.errors import CommandError
from kdkernels.transformers.cache import TopKCache, is_cache
from kdkernels.transformers.config import CHECKPOINTING, KDConfig
from kdkernels.transformers.data import Example
from kdkernels.transformers.distill.configuration import RUN, read_run
from kdkernels.transformers.distill.data import check_answers, check_length, digest_of, examples_of
from kdkernels.transformers.distill.errors import json_of, of_option, refused, reporting, unreadable
from kdkernels.transformers.distill.options import BY_NAME, FREE
from kdkernels.transformers.distill.report import Watch, plot, show
from kdkernels.transformers.load import load_model, load_tokenizer
from kdkernels.transformers.trainer import KDTrainer

COMMAND = "distill"
RESULTS, STUDENT, PLOT = "results.json", "student", "loss.png"


def distill(settings: argparse.Namespace, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run, or go on with, what ``settings`` describe (all of options.OPTIONS); returns what results.json holds.

    Raises CommandError for all that the person who gave the settings can put right, before the models are loaded where that can
    be known, and where a file cannot be written: what was written before is whole then.
    """
    # One process of several speaks and writes.
    first = int(os.environ.get("RANK", "0")) == 0
    console = console or terminal.Output()
    say: Callable[[str], None] = partial(terminal.say, console) if first else lambda text: None
    out = Path(settings.out).expanduser()
    settings = argparse.Namespace(**{**vars(settings), "teacher": os.path.expanduser(settings.teacher)})
    earlier = _earlier(out, settings, resume)
    with refused():
        config = _config(settings, out)
    if earlier is not None and (out / RESULTS).exists():
        results: dict[str, Any] = json_of(out / RESULTS)
        say(f"finished before: {out / RESULTS}")
        show(console, results, out / STUDENT)
        return results

    cache = TopKCache(settings.teacher) if is_cache(settings.teacher) else None
    tokenizer = of_option("student", load_tokenizer, settings.student)
    train, held_out, longest_prompt = examples_of(settings, tokenizer, cache, say)
    digest = digest_of(train, held_out)
    if earlier is not None and earlier["data"] != digest:
        raise CommandError(f"--resume: the data is not that of the run in {out}; accepted: the same, or another --out")
    run: dict[str, Any] = {"settings": _kept(settings), "data": digest, "before": earlier and earlier["before"]}
    with files.writing(out, "what was finished before is whole, and with room the same command with --resume goes on"):
        if first:
            files.claim(out, COMMAND)
            files.write(out / RUN, json.dumps(run, indent=1).encode())
            _tidy(out)
        with terminal.without_file_bars(), reporting(config):
            trainer = _trainer(settings, config, tokenizer, train, held_out, longest_prompt)
            checkpoint = last_checkpoint(out) if earlier is not None else None
            if resume:
                say(f"continuing from {checkpoint}" if checkpoint else "there is no checkpoint yet: starting from the beginning")
            say(f"{len(train):,} examples to learn from, {len(held_out):,} held out")
            results = _trained(trainer, checkpoint, run, out, console if first else None)
        results = {**results, "train_examples": len(train), "eval_examples": len(held_out)}
        if first:
            if missing := plot(out / PLOT, results):
                say(missing)
            files.write(out / RESULTS, json.dumps(results, indent=1).encode())
            show(console, results, out / STUDENT)
    return results


def _trained(
    trainer: KDTrainer, checkpoint: Path | None, run: dict[str, Any], out: Path, console: Console | None
) -> dict[str, Any]:
    """Train and save the student; what there is to tell of it. console: None where another process speaks and writes."""
    started, first_step = 0.0, 0

    def begin() -> None:
        nonlocal started, first_step
        if run["before"] is None:
            run["before"] = _evaluation(trainer)
            if console is not None:
                files.write(out / RUN, json.dumps(run, indent=1).encode())
        started, first_step = time.monotonic(), trainer.state.global_step

    with refused(), Watch(console) as watch:
        callbacks = _AtStart(begin), watch.callback()
        for callback in callbacks:
            trainer.add_callback(callback)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except Exception as error:
            if checkpoint is not None and not started and unreadable(error):
                raise files.damaged(checkpoint, str(error)) from error
            raise
        for callback in callbacks:
            trainer.remove_callback(callback)
    seconds = time.monotonic() - started
    after = _evaluation(trainer)
    with refused():
        trainer.save_model(str(out / STUDENT))
    return {
        "settings": run["settings"],
        "steps": trainer.state.global_step,
        "timed_steps": trainer.state.global_step - first_step,  # of this run, where it goes on with another
        "seconds": round(seconds, 2),
        # of the timed steps: those that count in the loss, over the time without evaluations and checkpoints
        "tokens": round(watch.tokens),
        "tokens_per_second": round(watch.tokens / watch.seconds, 1) if watch.tokens else 0.0,
        "before": run["before"],
        "after": after,
        "log": trainer.state.log_history,
    }


def _trainer(
    settings: argparse.Namespace,
    config: KDConfig,
    tokenizer: Any,
    train: Sequence[Example],
    held_out: Sequence[Example],
    longest_prompt: int,
) -> KDTrainer:
    longest = max(len(example["input_ids"]) for part in (train, held_out) for example in part)
    student = of_option("student", load_model, settings.student, dtype=settings.dtype)
    check_length("student", student, longest)
    check_answers("student", student, longest_prompt, settings.max_new_tokens)
    teacher = teacher_tokenizer = None
    if not is_cache(settings.teacher):
        teacher = of_option("teacher", load_model, settings.teacher, dtype=settings.teacher_dtype)
        check_length("teacher", teacher, longest)
        check_answers("teacher", teacher, longest_prompt, settings.max_new_tokens)
        teacher_tokenizer = of_option("teacher", load_tokenizer, settings.teacher)
    with refused():
        trainer = KDTrainer(
            student,
            config,
            train_dataset=train,
            eval_dataset=held_out or None,
            processing_class=tokenizer,
            teacher=settings.teacher if teacher is None else teacher,
            teacher_processing_class=teacher_tokenizer,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def last_checkpoint(out: Path) -> Path | None:
    """The newest that is whole."""
    return max(filter(_whole, _checkpoints(out)), key=lambda path: int(path.name[11:]), default=None)


def _checkpoints(out: Path) -> list[Path]:
    return [path for path in out.glob("checkpoint-*") if path.name[11:].isdigit()]


def _whole(checkpoint: Path) -> bool:
    """Its trainer_state.json is written after all else of it, but not in one move: on a full disk it may be cut short."""
    try:
        return isinstance(json.loads((checkpoint / "trainer_state.json").read_bytes()), dict)
    except (OSError, ValueError):
        return False


def _tidy(out: Path) -> None:
    """Without checkpoints that are not whole: they take room, and the Trainer, which keeps the newest, would keep them."""
    for path in _checkpoints(out):
        if not _whole(path):
            shutil.rmtree(path)


# ---- before anything is loaded ----


def _config(settings: argparse.Namespace, out: Path) -> KDConfig:
    evaluates = settings.eval_steps is not None
    if settings.on_policy_schedule == "adaptive" and not evaluates:
        raise CommandError("--on-policy-schedule adaptive goes by evaluations, and --eval-steps is not given")
    if evaluates and settings.eval_data is None and settings.eval_fraction == 0:
        raise CommandError("--eval-steps needs held-out data: --eval-data, or an --eval-fraction above 0")
    given = {
        field: value
        for option in BY_NAME.values()
        for field in option.sets
        if (value := getattr(settings, option.name)) is not None
    }
    fixed = {
        "output_dir": str(out),
        CHECKPOINTING: settings.gradient_checkpointing,
        "warmup_steps": settings.warmup if settings.warmup < 1 else int(settings.warmup),
        "lr_scheduler_type": "constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        "save_strategy": "steps",
        "save_total_limit": 1,
        "eval_strategy": "steps" if evaluates else "no",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": _reports(settings.report_to),
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    return KDConfig(**{"num_train_epochs": 1.0, "save_steps": 0.1, **given, **fixed})


def _reports(names: str) -> list[str]:
    """Where the log is sent to, as transformers names it."""
    here = get_available_reporting_integrations()
    found: list[str] = []
    for name in map(str.strip, names.split(",")):
        if name in here or (name == "all" and here):
            found += here if name == "all" else [name]
        elif name != "none":
            wrong = "is not installed here" if name in ("all", *INTEGRATION_TO_CALLBACK) else "is not known"
            known = ", ".join(other for other in INTEGRATION_TO_CALLBACK if other not in here)
            raise CommandError(
                f"--report-to {name!r} {wrong}; accepted: {', '.join(('none', *(('all', *here) if here else ())))}; once "
                f"installed: {known}"
            )
    return list(dict.fromkeys(found))


def _kept(settings: argparse.Namespace) -> dict[str, Any]:
    """What run.json has of the settings, so that --resume takes them from there: all but the folder it lies in."""
    return {name: value for name, value in vars(settings).items() if name != "out"}


def _earlier(out: Path, settings: argparse.Namespace, resume: bool) -> dict[str, Any] | None:
    """run.json of the run to go on with, if there is one. An earlier run is neither overwritten nor continued as another."""
    files.check(out, COMMAND)  # a new folder is made when all that was given has been read
    if not ((out / RESULTS).exists() or last_checkpoint(out)):
        return None  # new, or cut off before it had computed anything that is worth keeping
    if not resume:
        state = "a finished run" if (out / RESULTS).exists() else "a run that is not finished"
        raise CommandError(f"--out {out} holds {state}; accepted: --resume, or another folder")
    earlier = read_run(out)
    recorded = earlier["settings"]
    for name, value in _kept(settings).items():
        before = recorded.get(name, BY_NAME[name].default)
        if before != value and name not in FREE:
            raise CommandError(
                f"--resume: --{name.replace('_', '-')} is {_said(value)}, and was {_said(before)} in the run in {out}; accepted: "
                "the same, or another --out"
            )
    return earlier


# ---- what is shown ----


def _said(value: Any) -> str:
    return "not given" if value is None else str(value)


def _evaluation(trainer: KDTrainer) -> dict[str, float]:
    """Means over the held-out tokens; empty where nothing is held out."""
    if trainer.eval_dataset is None:
        return {}
    with refused():
        metrics = trainer.evaluate()
    times = ("_second", "_runtime", "_time", "epoch")
    return {name.removeprefix("eval_"): value for name, value in metrics.items() if not name.endswith(times)}


class _AtStart(TrainerCallback):
    """Calls a function when the models are where training has them and no step is taken yet.

    Before ``train`` transformers evaluates no model that FSDP2 is to shard.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.function()
