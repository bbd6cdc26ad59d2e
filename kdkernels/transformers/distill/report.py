"""What a run of ``distill`` shows: its progress, a table, and a plot."""

from __future__ import annotations

import importlib.util
import io
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TaskID
from rich.table import Table
from transformers import TrainerCallback

from kdkernels.console import files, terminal

SHOWN = ("loss", "kd", "ce", "agreement")  # of an evaluation, in the final table
LOGGED = ("loss", "kd", "ce", "t", "teacher_loss", "on_policy_fraction", "agreement")  # in a line of progress, where they are
FIRST = ("loss", "tokens/s", "t", "teacher_loss", "on_policy_fraction")  # beside the bar, where there is not room for all
STUDENT_COLOUR, HELD_OUT_COLOUR, MOVING_COLOUR = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito


class Watch:
    """A bar with the last losses on a terminal, elsewhere a line for each report; in both a line for each evaluation.

    tokens, seconds: of the steps so far, the first without what did not count in the loss, the second without the time that
    evaluations and checkpoints took.
    """

    def __init__(self, console: Console | None) -> None:
        """console: None shows nothing."""
        self.console, self.bar = console, terminal.Bar(console)
        self.task: TaskID | None = None
        self.begun = (0, 0.0)
        self.tokens = self.seconds = 0.0
        self._reported = 0.0  # the seconds at the last report
        self._mark = 0.0  # until when time was counted

    def __enter__(self) -> Watch:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def begin(self, step: int, steps: int) -> None:
        self.begun = step, time.monotonic()
        self._mark = self.begun[1]
        self.task = self.bar.add_task("", total=steps, completed=step)

    def step(self, step: int) -> None:
        self._count()
        if self.task is not None:
            self.bar.update(self.task, completed=step)

    def pause_ends(self) -> None:
        """An evaluation or a checkpoint is done, which is no step."""
        self._mark = time.monotonic()

    def _count(self) -> None:
        now = time.monotonic()
        self.seconds, self._mark = self.seconds + now - self._mark, now

    def log(self, step: int, steps: int, logs: dict[str, float]) -> None:
        evaluation = "eval_loss" in logs
        if not evaluation and "loss" not in logs:
            return  # the sums at the end
        prefix = "eval_" if evaluation else ""
        parts = {name: f"{name} {logs[prefix + name]:.4g}" for name in LOGGED if prefix + name in logs}
        if not evaluation:
            self._count()  # on a GPU the report has waited for the steps before it
            self.tokens += logs.get("tokens", 0.0)
            spent, self._reported = self.seconds - self._reported, self.seconds
            parts["tokens/s"] = f"{logs.get('tokens', 0.0) / max(spent, 1e-9):,.0f} tokens/s"
            if self.task is not None:
                order = sorted(parts, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
                self.bar.update(self.task, description=self.bar.fitting([parts[name] for name in order], steps))
        if self.console is not None and (evaluation or not self.console.is_terminal):
            done, since = step - self.begun[0], time.monotonic() - self.begun[1]
            left = f", {since / done * (steps - step):.0f} s left" if done and not evaluation else ""
            of = f"step {step} of {steps}{', held out' if evaluation else ''}"
            terminal.say(self.console, f"{of}: {', '.join(parts.values())}{left}")

    def callback(self) -> TrainerCallback:
        watch = self

        class Reports(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                watch.begin(state.global_step, state.max_steps)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                watch.step(state.global_step)
                if state.global_step >= state.max_steps:
                    control.should_log = True  # the last steps are reported too, however few

            def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
                watch.log(state.global_step, state.max_steps, given["logs"])

            def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                watch.pause_ends()

            def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                watch.pause_ends()

        return Reports()


def show(console: Console, results: dict[str, Any], student: Path) -> None:
    """The table of before and after, how long it took, and where the student is."""
    if results["after"]:
        table = Table("held out", "before", "after", title=f"{results['settings']['method']}, {results['steps']:,} steps")
        for column in table.columns[1:]:
            column.justify = "right"
        for name in SHOWN:
            if name in results["after"]:
                table.add_row(name, *(f"{results[when][name]:.4f}" for when in ("before", "after")))
        console.print(table)
    steps, timed = results["steps"], results["timed_steps"]
    rate = results.get("tokens_per_second")  # not in runs of earlier versions
    terminal.say(
        console,
        f"{steps:,} steps{'' if timed == steps else f', the last {timed:,}'} in {results['seconds']:.0f} s"
        f"{f', {rate:,.0f} tokens/s' if rate else ''}",
    )
    terminal.say(console, f"student: {student}")


def plot(path: Path, results: dict[str, Any]) -> str | None:
    """The losses of the run over its steps, as a PNG file; where matplotlib is missing, what to say of that instead."""
    if importlib.util.find_spec("matplotlib") is None:
        return f"no {path.name}: matplotlib is not installed here (pip install matplotlib)"
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    log, settings = results["log"], results["settings"]
    learned = [entry for entry in log if "loss" in entry]
    moving = next((name for name in ("t", "teacher_loss", "on_policy_fraction") if learned and name in learned[0]), None)
    figure = Figure(figsize=(10 if moving else 7, 4.6), layout="constrained")
    axes = figure.subplots(1, 2 if moving else 1, squeeze=False)[0]
    few = {"marker": "o", "markersize": 3} if len(learned) <= 50 else {}
    axes[0].plot(
        [entry["step"] for entry in learned],
        [entry["loss"] for entry in learned],
        color=STUDENT_COLOUR,
        label="in training" + (", against the moving target" if moving == "t" else ""),
        alpha=0.8,
        **few,
    )
    held_out = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    if results["after"]:
        held_out = {0: results["before"]["loss"], **held_out, results["steps"]: results["after"]["loss"]}
        steps = sorted(held_out)
        axes[0].plot(steps, [held_out[step] for step in steps], color=HELD_OUT_COLOUR, label="held out", marker="o", markersize=4)
    axes[0].set(xlabel="steps", ylabel="loss (nats per token)", title="Student")
    axes[0].legend(frameon=False, fontsize=9)
    if moving is not None:
        names = {"t": "t, the teacher's share in the target", "teacher_loss": "teacher's loss (nats per token)"}
        values = [entry.get(moving, math.nan) for entry in learned]
        axes[1].plot([entry["step"] for entry in learned], values, color=MOVING_COLOUR, **few)
        axes[1].set(xlabel="steps", ylabel=names.get(moving, "part of the batches that the student writes"))
        axes[1].set_title({"t": "TAID", "teacher_loss": "Online teacher"}.get(moving, "On policy"))
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.xaxis.set_major_locator(MaxNLocator(integer=True))
    name = Path(str(settings["student"])).name
    figure.suptitle(f"distill: {name} from {Path(str(settings['teacher'])).name}, {settings['method']}", wrap=True)
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    files.write(path, content.getvalue())
    return None
