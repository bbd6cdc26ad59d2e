"""The models of benchmarks.methods: a teacher and students that learn from the text alone, and how these go on by each method."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback

from benchmarks.methods_scores import Judge, held_out
from kdkernels.demo import corpus as corpora
from kdkernels.demo.corpus import Corpus
from kdkernels.demo.models import Model, build
from kdkernels.demo.settings import AGAINST, ModelSize, Settings
from kdkernels.demo.train import Phase, student_phase, teacher_phase, train
from kdkernels.errors import CommandError
from kdkernels.transformers import KDConfig, KDTrainer

SEARCH_SEED = 1000  # of the runs that choose a learning rate; no counted run has it
WARM_UP = 2  # steps that are not timed
EVALUATIONS = 10  # in a run whose schedule goes by them


@dataclass(frozen=True)
class Plan:
    """What decides every figure.

    settings: the demo's, for the text, the teacher, the students' first steps and what they write. students: by gap; "8:1" is one
    of about an eighth of the teacher's parameters. methods: options of KDConfig by name. steps: of each method, from the trained
    student on. rates: learning rates that each method is tried with. seeds: how many there are; each has a student of its own.
    timed_steps, rounds: a method's step is timed in so many rounds of so many steps.
    """

    settings: Settings
    students: dict[str, ModelSize]
    methods: dict[str, dict[str, Any]]
    steps: int
    rates: tuple[float, ...]
    seeds: int
    timed_steps: int = 16
    rounds: int = 5


class Windows(Dataset):  # type: ignore[type-arg]
    """Training windows by number; each is drawn by its number and the seed alone."""

    def __init__(self, corpus: Corpus, settings: Settings, seed: int, steps: int) -> None:
        self.rows = torch.cat([corpus.batch(settings, f"methods {seed}", step)[0] for step in range(steps)]).tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return _example(self.rows[index])


def _example(ids: list[int]) -> dict[str, list[int]]:
    return {"input_ids": ids, "labels": ids}


class Clock(TrainerCallback):
    """Seconds from the end of one step to the end of the next, with all that a step takes.

    The processor's, not the wall clock's: with one thread these are the same on a quiet machine, and nearly so on a busy one.
    """

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.process_time())

    def seconds(self) -> float:
        """A step's, as a mean: a method may do something else at each."""
        counted = self.ends[WARM_UP - 1 :]
        return (counted[-1] - counted[0]) / (len(counted) - 1)


def halves(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """The corpus with the first files of the held-out text, about a third of it, to choose by; and with the others, to judge by."""
    ends = (corpus.heldout == 0).nonzero().flatten()[:-1] + 1  # token 0 ends each file
    if not len(ends):
        raise CommandError("one held-out file is too few to be split; accepted: two or more")
    cut = int(ends[(ends - corpus.heldout.numel() / 3).abs().argmin()])
    parts = corpus.heldout[:cut], corpus.heldout[cut:]
    first, second = (dataclasses.replace(corpus, heldout=part) for part in parts)
    return first, second


class Bench:
    """All that the runs share. folder: of the cache; its files are named by a key of what made them."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.corpus, test = halves(corpora.prepare(plan.settings, folder, print))
        self.teacher = self._learned(teacher_phase(plan.settings, self.corpus), plan.settings)
        self.judge = Judge(plan.settings, test, self.teacher)
        self.validation = self.corpus.held_out(plan.settings.heldout_windows, plan.settings.window)

    def _learned(self, phase: Phase, settings: Settings) -> Model:
        def watch(phase: Phase, note: str) -> None:
            if not phase.cached and (phase.step == phase.steps or phase.step % 1000 == 0):
                print(f"by cross-entropy: step {phase.step} of {phase.steps}, {note} nats, {phase.seconds:.0f} s", flush=True)

        train(phase, settings, self.corpus, self.folder / f"{phase.name}-{phase.key}.safetensors", True, watch)
        return phase.learners[0].model

    def student(self, gap: str, seed: int) -> Model:
        """One that learned from the text alone; where every method starts."""
        settings = dataclasses.replace(self.plan.settings, student=self.plan.students[gap], seed=seed)
        return self._learned(student_phase(settings, self.corpus), settings)

    def untrained(self, gap: str) -> Model:
        settings = self.plan.settings
        return build(self.plan.students[gap], self.corpus.facts["vocab"], settings.window, settings.seed)

    def validation_loss(self, model: Model) -> float:
        return held_out(model, *self.validation)["loss"]

    def further(self, start: Model, name: str, rate: float, seed: int, steps: int, clock: Clock | None = None) -> Model:
        """A copy of the student after ``steps`` more by a method. rate: the highest learning rate; it follows half a cosine."""
        student, settings, options = copy.deepcopy(start), self.plan.settings, dict(self.plan.methods[name])
        if options.get("on_policy_schedule") == "adaptive":
            options |= {"eval_strategy": "steps", "eval_steps": max(1, steps // EVALUATIONS)}
        watched, _ = self.corpus.held_out(settings.curve_windows, settings.window)
        with tempfile.TemporaryDirectory() as folder:
            args = KDConfig(
                output_dir=folder,
                seed=seed,
                max_steps=steps,
                per_device_train_batch_size=settings.batch,
                learning_rate=rate,
                adam_beta2=0.99,
                lr_scheduler_type="cosine",
                warmup_steps=max(1, steps // 20),
                train_sampling_strategy="sequential",
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                vocab_size=self.corpus.facts["vocab"],  # the models have one vocabulary, and no tokenizers with them to compare
                **options,
            )
            trainer = KDTrainer(
                student,
                args,
                train_dataset=Windows(self.corpus, settings, seed, steps),
                eval_dataset=list(map(_example, watched.tolist())),
                teacher=self.teacher,
                callbacks=[clock] if clock else [],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            if trainer.online is not None:
                trainer.online.unload()
        return student

    def step_times(self, gap: str, name: str) -> dict[str, Any]:
        """A step's median seconds, and over those of a cross-entropy step that was timed right before it, round by round."""
        start, ratios, seconds = self.untrained(gap), [], []
        for turn in range(self.plan.rounds):
            took = []
            for each in (AGAINST, name):
                clock = Clock()
                self.further(start, each, min(self.plan.rates), turn, WARM_UP + self.plan.timed_steps, clock)
                took.append(clock.seconds())
            seconds.append(took[1])
            ratios.append(took[1] / took[0])
        return {"seconds": sorted(seconds)[len(seconds) // 2], "ratios": ratios}
