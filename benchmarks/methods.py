"""The methods of the papers side by side on the demo's corpus: held-out loss, next-token accuracy and time per step of a student.

    python -m benchmarks.methods                       # 9 runs for each of 3 seeds; about half an hour on 2 cores
    python -m benchmarks.methods --only taid --fresh   # these runs again, the others kept

A teacher (the demo's) is trained once on the Python sources of the interpreter. Then for each seed and method a student,
initialised by the seed, takes the same steps on the same windows through ``KDTrainer``, from the teacher's distribution alone;
"cross-entropy" learns from the text alone. Nothing is tuned for any method: one learning rate, published or default settings.
Held-out losses are computed in plain PyTorch on whole files that no model has seen. The methods take turns within a seed, so that a
machine that slows down does so for all of them.

Results go to benchmarks/results/methods.json after each run, from there by ``python -m benchmarks.plots`` to methods.png, and by
``python -m benchmarks.readme`` into the README.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from benchmarks.readme import methods_table
from kdkernels.console import files, info
from kdkernels.demo import corpus as corpora
from kdkernels.demo.corpus import Corpus
from kdkernels.demo.models import Model, build, hidden_states, mean_and_error
from kdkernels.demo.settings import ModelSize, Settings
from kdkernels.demo.train import teacher_phase, train
from kdkernels.transformers import KDConfig, KDTrainer

CACHE = Path("demo-output") / "methods"
RESULTS = Path(__file__).parent / "results" / "methods.json"
SEEDS, STEPS = 3, 500
WARM_UP = 5  # steps that are not timed
# The teacher takes its planned steps however long they last, so that its weights do not depend on the machine's speed.
SETTINGS = Settings(teacher_steps=6000, teacher_seconds=1e9, student=ModelSize(width=64, layers=1, heads=2))
RUNS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"kd_weight": 0.0, "ce_weight": 1.0},
    "forward KL": {"method": "forward_kl"},
    "reverse KL": {"method": "reverse_kl"},
    "JSD": {"method": "jsd"},
    "skew forward KL": {"method": "skew_forward_kl"},
    "skew reverse KL": {"method": "skew_reverse_kl"},
    "TAID": {"method": "taid"},
    "OKD": {"method": "okd", "okd_learning_rate": 1e-3},
    "GKD": {"method": "jsd", "on_policy_fraction": 0.5, "on_policy_max_new_tokens": 64},
}


class Windows(Dataset):  # type: ignore[type-arg]
    """Training windows by number; each is drawn by its number and the seed alone."""

    def __init__(self, corpus: Corpus, settings: Settings, seed: int, steps: int) -> None:
        self.batches = [corpus.batch(settings, f"methods {seed}", step)[0] for step in range(steps)]

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.batches)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        at, row = divmod(index, len(self.batches[0]))
        ids = self.batches[at][row].tolist()
        return {"input_ids": ids, "labels": ids}


class Clock(TrainerCallback):
    """Seconds from the end of one step to the end of the next, with all that a step takes."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        counted = self.ends[min(WARM_UP, len(self.ends) - 2) :]
        return (counted[-1] - counted[0]) / (len(counted) - 1)


@torch.no_grad()
def held_out(model: Model, inputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Loss in nats per token with its standard error over windows, and next-token accuracy; in plain PyTorch."""
    model.eval()
    losses, hits = [], []
    for x, y in zip(inputs.split(2), labels.split(2), strict=True):
        logits = hidden_states(model, x) @ model.lm_head.weight.T
        losses.append(torch.nn.functional.cross_entropy(logits.mT, y, reduction="none").mean(1))
        hits.append((logits.argmax(-1) == y).double().mean(1))
    loss, error = mean_and_error(torch.cat(losses))
    return {"loss": loss, "error": error, "accuracy": float(torch.cat(hits).mean())}


def trained_teacher(settings: Settings, corpus: Corpus, folder: Path) -> Model:
    """The demo's teacher, from the folder where it was finished before."""
    phase = teacher_phase(settings, corpus)

    def watch(phase: Any, note: str) -> None:
        if note and phase.step % max(1, phase.steps // 10) == 0:
            print(f"teacher: step {phase.step} of {phase.steps}, held out {note}", flush=True)

    train(phase, settings, corpus, folder / "teacher.safetensors", True, watch)
    return phase.learners[0].model


def run(name: str, seed: int, steps: int, settings: Settings, corpus: Corpus, teacher: Model) -> dict[str, float]:
    """One student, trained and judged."""
    student = build(settings.student, corpus.facts["vocab"], settings.window, seed)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = KDConfig(
            output_dir=folder,
            seed=seed,
            max_steps=steps,
            per_device_train_batch_size=settings.batch,
            learning_rate=settings.learning_rate,
            adam_beta2=0.99,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **RUNS[name],
        )
        trainer = KDTrainer(student, args, train_dataset=Windows(corpus, settings, seed, steps), teacher=teacher, callbacks=[clock])
        trainer.train()
        if trainer.online is not None:
            trainer.online.unload()
    found = held_out(student, *corpus.held_out(settings.heldout_windows, settings.window))
    return {**found, "seconds_per_step": clock.seconds()}


def measure(
    settings: Settings, folder: Path, path: Path, *, steps: int, seeds: int, names: tuple[str, ...], fresh: bool = False
) -> dict[str, Any]:
    """Everything that is not in the results yet; written after each run."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = corpora.prepare(settings, folder, print)
    teacher = trained_teacher(settings, corpus, folder)
    setup = {"steps": steps, "seeds": list(range(seeds)), "corpus": corpus.facts, "settings": {name: RUNS[name] for name in RUNS}}
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if any(results.get(key) != value for key, value in json.loads(json.dumps(setup)).items()):
        results = {**setup, "runs": {name: {} for name in RUNS}}
    results["teacher"] = held_out(teacher, *corpus.held_out(settings.heldout_windows, settings.window))
    for seed in range(seeds):
        for name in names:
            runs = results["runs"].setdefault(name, {})
            if str(seed) in runs and not fresh:
                continue
            runs[str(seed)] = run(name, seed, steps, settings, corpus, teacher)
            results["machine"] = {**info.facts(), "threads": torch.get_num_threads(), "date": datetime.date.today().isoformat()}
            files.write(path, (json.dumps(results, indent=1) + "\n").encode())
            figures = "  ".join(f"{key} {value:.4f}" for key, value in runs[str(seed)].items())
            print(f"seed {seed}  {name:16} {figures}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="methods whose name contains this")
    parser.add_argument("--fresh", action="store_true", help="run again what is in the results")
    arguments = parser.parse_args()
    names = tuple(name for name in RUNS if arguments.only.lower() in name.lower())
    if not names:
        parser.error(f"--only {arguments.only!r} is in no name; accepted: parts of {', '.join(RUNS)}")
    transformers_logging.set_verbosity_error()
    results = measure(SETTINGS, CACHE, RESULTS, steps=STEPS, seeds=SEEDS, names=names, fresh=arguments.fresh)
    print(methods_table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
