"""The training loop of teacher and students, and its checkpoints.

The student is trained first, by cross-entropy; then copies of it go on, each by a method. They learn in lockstep: at each step all
of them see the same batch, and the teacher runs once for it. So they have had the same data and the same number of steps at any
moment, also when a run is cut off and resumed.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.console import files
from kdkernels.demo.corpus import Corpus
from kdkernels.demo.models import Model, build, heldout_losses, hidden_states, mean_and_error
from kdkernels.demo.settings import AGAINST, ModelSize, Settings, fingerprint
from kdkernels.errors import CommandError
from kdkernels.transformers.online import OnlineTeacher

FEWEST_STEPS = 20
WARM_UP = 0.05  # of the steps, in which the learning rate rises
TIMED_STEPS = 4


@dataclass
class Learner:
    """A model in training. objective: options of ``linear_kd_loss``. schedule: moves the target (TAID), or None.

    online: the teacher that adapts to this student alone (OKD), or None.
    curve: [step, held-out loss, its standard error]. t: the schedule's t at the same steps. seconds: of its own part of the steps.
    """

    name: str
    model: Model
    optimizer: torch.optim.Optimizer
    objective: dict[str, float]
    schedule: kd.TAIDSchedule | None = None
    online: OnlineTeacher | None = None
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    t: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Phase:
    """Learners in lockstep. teacher: frozen, or None where nothing is distilled. key: what a checkpoint must have been made with.

    rate: the highest learning rate.
    planned: steps on a machine fast enough to do them in ``allowed`` seconds; ``steps`` is what this run does and
    ``threads`` what it does them with (0 steps: not decided yet). paces: seconds of a step by number of threads, as far as known.
    """

    name: str
    learners: list[Learner]
    teacher: Model | None
    planned: int
    allowed: float
    key: str
    rate: float
    steps: int = 0
    step: int = 0
    threads: int = 1
    paces: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    cached: bool = False


# Called at the start and after each step, with the latest held-out losses (nats per token) in words.
Watch = Callable[[Phase, str], None]


def _optimizer(model: Model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)


def _alone(name: str, size: ModelSize, steps: int, seconds: float, settings: Settings, corpus: Corpus) -> Phase:
    """A model that learns from the text, from random weights."""
    # What decides its weights; the rest of the settings may change without it being trained anew.
    key = fingerprint(
        corpus=corpus.key,
        size=size,
        run=[settings.minutes, settings.seed, settings.window, settings.batch, settings.learning_rate, steps],
        watched=[settings.curve_windows, settings.evaluations],
        torch=torch.__version__,
    )
    model = build(size, corpus.facts["vocab"], settings.window, settings.seed)
    learner = Learner(name, model, _optimizer(model), {"kd_weight": 0.0, "ce_weight": 1.0})
    return Phase(
        name, [learner], None, max(round(steps * settings.scale), 1), seconds * settings.scale, key, settings.learning_rate
    )


def teacher_phase(settings: Settings, corpus: Corpus) -> Phase:
    return _alone("teacher", settings.teacher, settings.teacher_steps, settings.teacher_seconds, settings, corpus)


def student_phase(settings: Settings, corpus: Corpus) -> Phase:
    """The student before it is distilled."""
    return _alone("student", settings.student, settings.student_steps, settings.student_seconds, settings, corpus)


def further_phase(settings: Settings, corpus: Corpus, teacher: Phase, student: Phase) -> Phase:
    """Copies of the student, each of which goes on by a method of its own."""
    before = [[phase.key, phase.steps] for phase in (teacher, student)]
    key = fingerprint(settings=settings, corpus=corpus.key, before=before, torch=torch.__version__)
    model = teacher.learners[0].model
    online = OnlineTeacher(copy.deepcopy(model), seed=settings.seed)
    online.optimize_with(torch.optim.AdamW, {"betas": (0.9, 0.99)}, settings.lora_rate)
    methods: dict[str, dict[str, Any]] = {
        AGAINST: {"objective": {"kd_weight": 0.0, "ce_weight": 1.0}},
        "forward KL": {"objective": {}},
        "TAID": {"objective": {}, "schedule": kd.TAIDSchedule()},
        "OKD": {"objective": {}, "online": online},
    }
    learners = []
    for name, parts in methods.items():
        start = copy.deepcopy(student.learners[0].model)
        learners.append(Learner(name, start, _optimizer(start), **parts))
    planned, allowed = settings.further_steps * settings.scale, settings.further_seconds * settings.scale
    return Phase("students", learners, model, max(round(planned), 1), allowed, key, settings.further_rate)


def train(phase: Phase, settings: Settings, corpus: Corpus, path: Path, resume: bool, watch: Watch) -> None:
    """Bring the phase to its last step, from its checkpoint at ``path`` where there is one to go on from.

    What learned alone and is finished is taken as it is; an unfinished phase goes on only where ``resume`` asks for it, and else
    starts anew.
    """
    begun = time.monotonic()
    if not _take_up(phase, settings, path, resume):
        path.unlink(missing_ok=True)
        phase.paces = paces(phase, settings, corpus)
        _fit(phase)
    earlier = phase.seconds
    torch.set_num_threads(phase.threads)
    watched = corpus.held_out(settings.curve_windows, settings.window)
    note = "" if phase.learners[0].curve else _evaluate(phase, *watched)
    watch(phase, note)
    saved = looked = time.monotonic()
    looked_step = phase.step
    while phase.step < phase.steps:
        take_step(phase, corpus.batch(settings, phase.name, phase.step))
        now = time.monotonic()
        phase.seconds = earlier + now - begun
        if now - looked >= settings.pace_seconds:
            _keep_up(phase, (now - looked) / (phase.step - looked_step))
            looked, looked_step = time.monotonic(), phase.step
        if phase.step in _stops(phase.steps, settings.evaluations):
            note = _evaluate(phase, *watched)
        if phase.step == phase.steps or now - saved >= settings.checkpoint_seconds:
            save(phase, settings, path)
            saved = time.monotonic()
        watch(phase, note)


def _stops(steps: int, evaluations: int) -> set[int]:
    """Steps after which the held-out loss is taken; the last one is among them."""
    return {round(steps * part / evaluations) for part in range(1, evaluations + 1)}


def _fit(phase: Phase) -> None:
    """Choose the fastest number of threads, and as many of the steps as fit into what is left of the allowed seconds with it."""
    phase.threads = min(phase.paces, key=phase.paces.__getitem__)
    torch.set_num_threads(phase.threads)
    fitting = phase.step + int((phase.allowed - phase.seconds) / phase.paces[phase.threads])
    phase.steps = max(min(phase.steps or phase.planned, max(fitting, FEWEST_STEPS)), phase.step)


def _keep_up(phase: Phase, pace: float) -> None:
    """Where the machine has become slower than it was measured, choose again: all learners then stop at one earlier step."""
    if phase.seconds + pace * (phase.steps - phase.step) > 1.2 * phase.allowed:
        phase.paces[phase.threads] = pace
        _fit(phase)


def take_step(phase: Phase, batch: tuple[Tensor, Tensor]) -> None:
    """One optimizer step of every learner on one batch."""
    inputs, labels = batch
    target = None
    if phase.teacher is not None:
        with torch.no_grad():
            target = hidden_states(phase.teacher, inputs), phase.teacher.lm_head.weight.detach()
    factor = learning_rate_at(phase.step / phase.steps)
    for learner in phase.learners:
        begun = time.monotonic()
        metrics = _backward(learner, inputs, labels, target)
        torch.nn.utils.clip_grad_norm_(learner.model.parameters(), 1.0)
        for group in learner.optimizer.param_groups:
            group["lr"] = phase.rate * factor
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        if learner.online is not None:
            learner.online.step(factor, 1.0)
        if learner.schedule is not None:
            # The cross-entropy between target and student, which the authors of TAID feed the controller.
            learner.schedule.update(metrics["kd"] + metrics["target_entropy"], (phase.step + 1) / phase.steps)
        learner.seconds += time.monotonic() - begun
    phase.step += 1


def _backward(learner: Learner, inputs: Tensor, labels: Tensor, target: tuple[Tensor, Tensor] | None) -> Any:
    """Gradients of a learner's loss on a batch; returns the loss's metrics, which only TAID looks at."""
    hidden, head = hidden_states(learner.model, inputs), learner.model.lm_head.weight
    if learner.online is not None:
        teacher = learner.online.model.get_base_model()  # with the LoRA at work
        losses = kd.linear_okd_loss(hidden, head, hidden_states(teacher, inputs), teacher.lm_head.weight, labels)
        (losses.student + losses.teacher).backward()
        return {}
    # Without a teacher only the labels count (kd_weight 0), and what stands in the teacher's place is never multiplied.
    teacher_hidden, teacher_head = target or (hidden.detach(), head.detach())
    # Metrics only where the controller needs them: they look at the teacher even where the loss does not.
    schedule = learner.schedule
    options: dict[str, Any] = learner.objective if schedule is None else {"t": schedule.t, "return_metrics": True}
    result = kd.linear_kd_loss(hidden, head, teacher_hidden, teacher_head, labels, **options)
    loss, metrics = (result, {}) if schedule is None else result
    loss.backward()
    return metrics


def learning_rate_at(progress: float) -> float:
    """Factor of the learning rate: a short rise, then half a cosine down to a twentieth."""
    return min(1.0, (progress + 0.001) / WARM_UP) * (0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * progress)))


def paces(phase: Phase, settings: Settings, corpus: Corpus) -> dict[int, float]:
    """Seconds of a step by number of threads: models this small are not fastest with every core of a large machine."""
    most = torch.get_num_threads()
    candidates = sorted({2**power for power in range(most.bit_length())} | {most})
    return {threads: _step_seconds(phase, settings, corpus, threads) for threads in candidates}


def _step_seconds(phase: Phase, settings: Settings, corpus: Corpus, threads: int) -> float:
    """Measured on a copy of the learners, which stay as they are."""
    trial = copy.copy(phase)
    trial.learners, trial.step, trial.steps = copy.deepcopy(phase.learners), 0, TIMED_STEPS + 1
    torch.set_num_threads(threads)
    seconds = []
    for step in range(TIMED_STEPS + 1):
        begun = time.monotonic()
        take_step(trial, corpus.batch(settings, "trial", step))
        seconds.append(time.monotonic() - begun)
    return statistics.mean(seconds[1:])  # the first warms up


def _evaluate(phase: Phase, inputs: Tensor, labels: Tensor) -> str:
    for learner in phase.learners:
        mean, error = mean_and_error(heldout_losses(learner.model, inputs, labels))
        learner.curve.append((phase.step, mean, error))
        if learner.schedule is not None:
            learner.t.append(float(learner.schedule.t))
    return ", ".join(f"{learner.name} {learner.curve[-1][1]:.2f}" for learner in phase.learners)


def save(phase: Phase, settings: Settings, path: Path) -> None:
    """Everything that the next step depends on; the batches depend on the step alone."""
    tensors: dict[str, Tensor] = {}
    for learner in phase.learners:
        for name, parameter in learner.model.named_parameters():
            tensors[f"{learner.name}/model/{name}"] = parameter
        tensors |= _moments(f"{learner.name}/optimizer", learner.optimizer.state_dict())
        if learner.schedule is not None:
            for name, value in learner.schedule.state_dict().items():
                tensors[f"{learner.name}/schedule/{name}"] = value
        if learner.online is not None:
            state = learner.online.state_dict()
            tensors |= {f"{learner.name}/lora/{name}": value for name, value in state["lora"].items()}
            tensors |= _moments(f"{learner.name}/lora optimizer", state["optimizer"])
    about = {
        "key": phase.key,
        "minutes": settings.minutes,
        "seed": settings.seed,
        "step": phase.step,
        "steps": phase.steps,
        "threads": phase.threads,
        "seconds": phase.seconds,
        "learners": {
            learner.name: {"curve": learner.curve, "t": learner.t, "seconds": learner.seconds} for learner in phase.learners
        },
    }
    files.save(path, tensors, about)


def _moments(prefix: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """An optimizer's state as named tensors."""
    return {f"{prefix}/{index}/{name}": value for index, of_one in state["state"].items() for name, value in of_one.items()}


def _take_up(phase: Phase, settings: Settings, path: Path, resume: bool) -> bool:
    """Put the checkpoint's state into the phase, where there is one that may be used."""
    if not path.exists() or not (resume or phase.teacher is None):
        return False
    tensors, about = files.load(path)
    if about["key"] != phase.key:
        if not resume:
            return False
        raise CommandError(
            f"--resume cannot continue {path}: it was made with --minutes {about['minutes']:g} --seed {about['seed']}, or from "
            f"other Python sources or libraries, and this run has --minutes {settings.minutes:g} --seed {settings.seed}; "
            "give the same, or leave --resume out to start anew"
        )
    if not resume and about["step"] < about["steps"]:
        return False
    phase.step, phase.steps, phase.threads, phase.seconds = (about[name] for name in ("step", "steps", "threads", "seconds"))
    phase.cached = phase.step == phase.steps
    try:
        for learner in phase.learners:
            _restore(learner, tensors, about["learners"][learner.name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise files.damaged(path, str(error)) from error
    return True


def _restore(learner: Learner, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    def part(kind: str) -> dict[str, Tensor]:
        prefix = f"{learner.name}/{kind}/"
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    def optimizer_state(kind: str, now: dict[str, Any]) -> dict[str, Any]:
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in part(kind).items():
            index, _, entry = name.partition("/")
            state.setdefault(int(index), {})[entry] = tensor
        return {**now, "state": state}

    weights = part("model")
    with torch.no_grad():
        for name, parameter in learner.model.named_parameters():
            parameter.copy_(weights[name])
    learner.optimizer.load_state_dict(optimizer_state("optimizer", learner.optimizer.state_dict()))
    if learner.schedule is not None:
        learner.schedule.load_state_dict(part("schedule"))
    if learner.online is not None:
        optimizer = optimizer_state("lora optimizer", learner.online.state_dict()["optimizer"])
        learner.online.load_state_dict({"lora": part("lora"), "optimizer": optimizer})
    learner.curve = [(step, mean, error) for step, mean, error in about["curve"]]
    learner.t, learner.seconds = about["t"], about["seconds"]
