"""The run behind ``python -m kdkernels distill``: from names of models and data to a trained student.

The output folder holds

- kdkernels-distill.json: the marker by which the folder is known;
- run.json: settings and a digest of the data, written before the first step, and the held-out metrics of the untrained student;
- checkpoint-N: the Trainer's; student: the trained model with its tokenizer;
- results.json: what the final table shows. It is written last: where it is, the run is finished.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from kdkernels import files
from kdkernels.errors import CommandError
from kdkernels.transformers.batches import most_positions
from kdkernels.transformers.cache import TOKENIZER, TopKCache, is_cache
from kdkernels.transformers.config import KDConfig
from kdkernels.transformers.data import Example, prepare
from kdkernels.transformers.distill_command import FREE
from kdkernels.transformers.load import load_model, load_tokenizer
from kdkernels.transformers.trainer import KDTrainer
from kdkernels.transformers.vocabularies import Known

COMMAND = "distill"
RUN, RESULTS, STUDENT = "run.json", "results.json", "student"
SHOWN = ("loss", "kd", "ce", "agreement")  # of an evaluation, in the final table
LOGGED = ("loss", "kd", "ce", "t", "teacher_loss", "on_policy_fraction", "agreement")  # in a line of progress, where they are


def distill(settings: argparse.Namespace, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run, or go on with, what ``settings`` describe (all of distill_command.OPTIONS); returns what results.json holds.

    Raises CommandError for all that the person who gave the settings can put right, before the models are loaded where that can
    be known.
    """
    # One process of several speaks and writes.
    first = int(os.environ.get("RANK", "0")) == 0
    console = console or Console()
    say = _speaker(console) if first else lambda text: None
    out = Path(settings.out).expanduser()
    with _refused():
        config = _config(settings, out)
    earlier = _earlier(out, settings, resume)
    if earlier is not None and (out / RESULTS).exists():
        results: dict[str, Any] = _json(out / RESULTS)
        say(f"finished before: {out / RESULTS}")
        _show(console, results, out)
        return results

    cache = TopKCache(settings.teacher) if is_cache(settings.teacher) else None
    tokenizer = _for("student", load_tokenizer, settings.student)
    train, held_out = _data(settings, tokenizer, cache, say)
    digest = _digest(train, held_out)
    if earlier is not None and earlier["data"] != digest:
        raise CommandError(f"--resume: the data is not that of the run in {out}; accepted: the same, or another --out")
    if first:
        files.claim(out, COMMAND)

    with _quiet():
        trainer = _trainer(settings, config, tokenizer, train, held_out)
        checkpoint = last_checkpoint(out) if earlier is not None else None
        if resume:
            say(f"continuing from {checkpoint}" if checkpoint else "there is no checkpoint yet: starting from the beginning")
        say(f"{len(train):,} examples to learn from, {len(held_out):,} held out")

        before = None if earlier is None else earlier["before"]
        started, first_step = 0.0, 0

        def begin() -> None:
            nonlocal before, started, first_step
            if before is None:
                before = _evaluation(trainer)
                if first:
                    run = {"settings": _kept(settings), "data": digest, "before": before}
                    files.write(out / RUN, json.dumps(run, indent=1).encode())
            started, first_step = time.monotonic(), trainer.state.global_step

        with _refused(), _Watch(console if first else None) as watch:
            callbacks = _AtStart(begin), watch.callback()
            for callback in callbacks:
                trainer.add_callback(callback)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            for callback in callbacks:
                trainer.remove_callback(callback)
        seconds = time.monotonic() - started
        after = _evaluation(trainer)
        with _refused():
            trainer.save_model(str(out / STUDENT))
    results = {
        "settings": _kept(settings),
        "steps": trainer.state.global_step,
        "timed_steps": trainer.state.global_step - first_step,  # of this run, where it goes on with another
        "seconds": round(seconds, 2),
        "train_examples": len(train),
        "eval_examples": len(held_out),
        "before": before,
        "after": after,
        "log": trainer.state.log_history,
    }
    if first:
        files.write(out / RESULTS, json.dumps(results, indent=1).encode())
        _show(console, results, out)
    return results


def _trainer(
    settings: argparse.Namespace,
    config: KDConfig,
    tokenizer: Any,
    train: Sequence[Example],
    held_out: Sequence[Example],
) -> KDTrainer:
    longest = max(len(example["input_ids"]) for part in (train, held_out) for example in part)
    student = _for("student", load_model, settings.student, dtype=settings.dtype)
    _check_length("student", student, longest)
    teacher = teacher_tokenizer = None
    if not is_cache(settings.teacher):
        teacher = _for("teacher", load_model, settings.teacher, dtype=settings.teacher_dtype)
        _check_length("teacher", teacher, longest)
        teacher_tokenizer = _for("teacher", load_tokenizer, settings.teacher)
    with _refused():
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
    """The newest that is whole: a checkpoint's trainer_state.json is written after all else of it."""
    found = [path for path in out.glob("checkpoint-*") if path.name[11:].isdigit() and (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name[11:]), default=None)


# ---- before anything is loaded ----


def _config(settings: argparse.Namespace, out: Path) -> KDConfig:
    evaluates = settings.eval_steps is not None
    if settings.on_policy_schedule == "adaptive" and not evaluates:
        raise CommandError("--on-policy-schedule adaptive goes by evaluations, and --eval-steps is not given")
    if evaluates and settings.eval_data is None and settings.eval_fraction == 0:
        raise CommandError("--eval-steps needs held-out data: --eval-data, or an --eval-fraction above 0")
    optional = {
        "taid_t_start": settings.taid_t_start,
        "okd_lora_rank": settings.lora_rank,
        "okd_teacher_alpha": settings.teacher_alpha,
    }
    return KDConfig(
        output_dir=str(out),
        method=settings.method,
        divergence=settings.divergence,
        divergence_parameter=settings.divergence_parameter,
        temperature=settings.temperature,
        kd_weight=settings.kd_weight,
        ce_weight=settings.ce_weight,
        okd_learning_rate=settings.teacher_learning_rate,
        save_teacher=bool(settings.save_teacher),
        on_policy_fraction=settings.on_policy_fraction,
        on_policy_schedule=settings.on_policy_schedule,
        on_policy_max_new_tokens=settings.max_new_tokens,
        topk_tail=settings.topk_tail,
        vocab_size=settings.vocab_size,
        memory_budget=settings.memory_budget,
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs or 1.0,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup if settings.warmup < 1 else int(settings.warmup),
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        bf16=settings.bf16,
        activation_checkpointing=settings.gradient_checkpointing,
        save_strategy="steps",
        save_steps=settings.save_steps or 0.1,
        save_total_limit=1,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_steps,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        **{name: value for name, value in optional.items() if value is not None},
    )


def _kept(settings: argparse.Namespace) -> dict[str, Any]:
    """The settings that decide what is computed."""
    return {name: value for name, value in vars(settings).items() if name not in FREE}


def _earlier(out: Path, settings: argparse.Namespace, resume: bool) -> dict[str, Any] | None:
    """run.json of the run to go on with, if there is one. An earlier run is neither overwritten nor continued as another."""
    if out.exists():
        files.claim(out, COMMAND)  # refuses what is not ours; a new folder is made when all that was given has been read
    if not (out / RUN).exists() or not ((out / RESULTS).exists() or last_checkpoint(out)):
        return None  # new, or cut off before it had computed anything that is worth keeping
    if not resume:
        state = "a finished run" if (out / RESULTS).exists() else "a run that is not finished"
        raise CommandError(f"--out {out} holds {state}; accepted: --resume, or another folder")
    earlier: dict[str, Any] = _json(out / RUN)
    for name, value in _kept(settings).items():
        before = earlier["settings"].get(name)
        if before != value:
            raise CommandError(
                f"--resume: --{name.replace('_', '-')} is {_said(value)}, and was {_said(before)} in the run in {out}; accepted: "
                "the same, or another --out"
            )
    return earlier


def _data(
    settings: argparse.Namespace, tokenizer: Any, cache: TopKCache | None, say: Callable[[str], None]
) -> tuple[Sequence[Example], Sequence[Example]]:
    """The examples to learn from, and those that are held out."""
    theirs = settings.teacher if cache is None else cache.folder / TOKENIZER
    # A program may have made a cache without a tokenizer; then its height is all that is known.
    teacher = _for("teacher", load_tokenizer, theirs) if cache is None or theirs.is_dir() else None
    with _refused():
        known = Known(tokenizer, teacher, rows=None if cache is None else cache.vocab_size, vocab_size=settings.vocab_size)

    def read(option: str, source: str, split: str, limit: int | None) -> list[Example]:
        prepared = _for(option, prepare, source, tokenizer, max_length=settings.max_length, split=split, limit=limit)
        if prepared.cut or prepared.dropped:
            say(f"{source}: {prepared.cut:,} examples cut at {settings.max_length} tokens, {prepared.dropped:,} dropped as empty")
        for note in prepared.notes:
            say(note)
        return list(prepared.examples)

    if settings.data is not None:
        train: Sequence[Example] = read("data", settings.data, settings.split, settings.limit)
    elif cache is not None:
        train = cache.examples()[: settings.limit]
    else:
        raise CommandError("--data is required, on the command line or in the file of --config")
    if settings.eval_data is not None:
        held_out: Sequence[Example] = read("eval_data", settings.eval_data, settings.eval_split or settings.split, None)
    else:
        count = math.ceil(settings.eval_fraction * len(train))
        if count >= len(train):
            raise CommandError(
                f"--eval-fraction {settings.eval_fraction:g} of {len(train):,} examples leaves none to learn from; accepted: "
                "--eval-data, more data, a smaller --max-length, or --eval-fraction 0"
            )
        train, held_out = train[: len(train) - count], train[len(train) - count :]
    first = "--data" if settings.data else f"the cache {settings.teacher}"
    for option, part in ((first, train), ("--eval-data" if settings.eval_data else first, held_out)):
        problem = known.problem(part)
        if problem is not None:
            raise CommandError(f"{option} has {problem}")
    return train, held_out


def _digest(*parts: Sequence[Example]) -> str:
    """Of the data, so that a run does not go on with other data."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        for example in part:
            for values in (example["input_ids"], example["labels"]):
                digest.update(len(values).to_bytes(8, "little") + array("q", values).tobytes())
        digest.update(b"end")
    return digest.hexdigest()


def _check_length(name: str, model: Any, longest: int) -> None:
    most = most_positions(model)
    if most is not None and longest > most:
        raise CommandError(
            f"the longest example has {longest:,} tokens, and the {name} takes {most:,}; accepted: --max-length {most}"
        )


# ---- errors ----


@contextmanager
def _refused() -> Iterator[None]:
    """The library's errors about what it was given, as the command's."""
    try:
        yield
    except CommandError:
        raise
    except torch.OutOfMemoryError as error:
        raise CommandError(
            "the GPU's memory is too small: try a smaller --batch-size (and more --gradient-accumulation), --max-length or "
            "--memory-budget, --gradient-checkpointing, or --bf16"
        ) from error
    except (ValueError, TypeError) as error:
        raise CommandError(" ".join(str(error).split())) from error
    except OSError as error:
        raise CommandError(f"--out cannot be written: {error}") from error


def _for(option: str, load: Callable[..., Any], name: str | Path, *arguments: Any, **options: Any) -> Any:
    """What ``load`` makes of an option's value; its error names the option."""
    try:
        return load(name, *arguments, **options)
    except CommandError as error:
        raise CommandError(f"--{option.replace('_', '-')}: {error}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise files.damaged(path, str(error)) from error


# ---- what is shown ----


def _speaker(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars that transformers draws for every file."""
    library: Any = transformers_logging
    drawn = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            library.enable_progress_bar()


def _said(value: Any) -> str:
    return "not given" if value is None else str(value)


def _evaluation(trainer: KDTrainer) -> dict[str, float]:
    """Means over the held-out tokens; empty where nothing is held out."""
    if trainer.eval_dataset is None:
        return {}
    with _refused():
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


class _Watch:
    """A bar with the last losses on a terminal; elsewhere a line for each report."""

    def __init__(self, console: Console | None) -> None:
        """console: None shows nothing."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True)
        self.bar = Progress(*columns, console=console, disable=console is None or not console.is_terminal)
        self.say = None if console is None or console.is_terminal else _speaker(console)
        self.task: TaskID | None = None
        self.begun = (0, 0.0)

    def __enter__(self) -> _Watch:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def begin(self, step: int, steps: int) -> None:
        self.begun = step, time.monotonic()
        self.task = self.bar.add_task("training", total=steps, completed=step)

    def step(self, step: int) -> None:
        if self.task is not None:
            self.bar.update(self.task, completed=step)

    def log(self, step: int, steps: int, logs: dict[str, float]) -> None:
        evaluation = "eval_loss" in logs
        if not evaluation and "loss" not in logs:
            return  # the sums at the end
        prefix = "eval_" if evaluation else ""
        values = {name: logs[prefix + name] for name in LOGGED if prefix + name in logs}
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self.task is not None and not evaluation:
            self.bar.update(self.task, description=text)
        if self.say is not None:
            done, since = step - self.begun[0], time.monotonic() - self.begun[1]
            left = f", {since / done * (steps - step):.0f} s left" if done and not evaluation else ""
            self.say(f"step {step} of {steps}{', held out' if evaluation else ''}: {text}{left}")
        if not evaluation and not math.isfinite(logs["loss"]):
            raise CommandError(
                f"the loss is {logs['loss']} at step {step}; a smaller --learning-rate or a longer --warmup may help"
            )

    def callback(self) -> TrainerCallback:
        watch = self

        class Reports(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                watch.begin(state.global_step, state.max_steps)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                watch.step(state.global_step)

            def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
                watch.log(state.global_step, state.max_steps, given["logs"])

        return Reports()


def _show(console: Console, results: dict[str, Any], out: Path) -> None:
    say = _speaker(console)
    if results["after"]:
        table = Table("held out", "before", "after", title=f"{results['settings']['method']}, {results['steps']:,} steps")
        for column in table.columns[1:]:
            column.justify = "right"
        for name in SHOWN:
            if name in results["after"]:
                table.add_row(name, *(f"{results[when][name]:.4f}" for when in ("before", "after")))
        console.print(table)
    steps, timed = results["steps"], results["timed_steps"]
    say(f"{steps:,} steps{'' if timed == steps else f', the last {timed:,}'} in {results['seconds']:.0f} s")
    say(f"student: {out / STUDENT}")
