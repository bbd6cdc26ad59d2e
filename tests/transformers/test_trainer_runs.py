"""A run that was interrupted, aborted or begun again is the run that was not; what is saved of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from kdkernels.transformers import KDTrainer, hidden_states
from tests.support.training import STEPS, assert_same, examples, logs, models, trainer, weights

RUNS: dict[str, dict[str, Any]] = {
    "taid": {"method": "taid", "taid_alpha": 0.1},
    "okd": {"method": "okd", "okd_lora_dropout": 0.2},
    "gkd": {"method": "jsd", "on_policy_fraction": 0.6, "on_policy_max_new_tokens": 5},
    "distillm": {
        "method": "skew_forward_kl",
        "on_policy_fraction": 0.5,
        "on_policy_schedule": "adaptive",
        "on_policy_max_new_tokens": 5,
        "replay_buffer_size": 6,
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("run", RUNS)
def test_an_interrupted_run_is_the_uninterrupted_one(run: str, tmp_path: Path) -> None:
    """Dropout in the student, too: the random numbers go on where they were."""

    def begun(folder: str) -> KDTrainer:
        given = {"save_strategy": "steps", "save_steps": 1, "seed": 7, "max_steps": 6, **RUNS[run]}
        student, _ = models(torch.float32, attention_dropout=0.3)
        return trainer(tmp_path / folder, student, train_dataset=examples(20), eval_dataset=examples(3, seed=3), **given)

    straight = begun("whole")
    straight.train()

    class Stop(transformers.TrainerCallback):
        def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == 3:
                raise Interrupted

    cut = begun("cut")
    cut.add_callback(Stop())
    with pytest.raises(Interrupted):
        cut.train()
    resumed = begun("cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))

    assert_same(weights(straight.model), weights(resumed.model))
    if straight.taid is not None:
        assert_same(straight.taid.state_dict(), resumed.taid.state_dict())
    if straight.online is not None:
        assert_same(weights(straight.teacher), weights(resumed.teacher))
    drop = ("epoch", "total_flos", "train_runtime")
    for entry, other in zip(logs(straight)[3:], logs(resumed)[3:], strict=True):
        assert {k: v for k, v in entry.items() if k not in drop} == {k: v for k, v in other.items() if k not in drop}


def test_a_run_with_students_writing_goes_on_from_one_without_only_by_saying_so(tmp_path: Path) -> None:
    given = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "on_policy_max_new_tokens": 4}
    trainer(tmp_path, **given).train()
    writing = trainer(tmp_path, on_policy_fraction=0.5, **given)
    with pytest.raises(ValueError, match=r"has no on_policy_0.pt: its run had no on_policy_fraction"):
        writing.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_only_the_student_is_saved_unless_asked(tmp_path: Path) -> None:
    for asked in (False, True):
        folder = tmp_path / str(asked)
        run = trainer(folder, method="okd", save_teacher=asked, max_steps=1)
        run.train()
        run.save_model()
        assert_same(weights(transformers.AutoModelForCausalLM.from_pretrained(folder)), weights(run.model))
        assert (folder / "teacher").exists() == asked
        if asked:
            peft = pytest.importorskip("peft")
            _, base = models(torch.float32)
            online = peft.PeftModel.from_pretrained(base, folder / "teacher")
            ids = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
            with torch.no_grad():
                assert torch.equal(hidden_states(online, ids), hidden_states(run.teacher.eval(), ids))


def test_a_second_run_of_taid_starts_where_the_first_did(tmp_path: Path) -> None:
    run = trainer(tmp_path, method="taid")
    ts = []
    for _ in range(2):
        run.train()
        ts.append([entry["t"] for entry in logs(run)])
    assert ts[0] == pytest.approx(ts[1], abs=1e-3)
    assert ts[0][0] < 0.6


class StopAtSubstep(transformers.TrainerCallback):  # type: ignore[misc]
    """Between a backward and the step."""

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        raise Interrupted


@pytest.mark.parametrize("run", ["okd", "taid", "gkd"])
def test_an_aborted_run_leaves_nothing_to_the_next(run: str, tmp_path: Path) -> None:
    found = []
    for aborted in (False, True):
        begun = trainer(tmp_path / str(aborted), **RUNS[run], seed=3)
        if aborted:
            stop = StopAtSubstep()
            begun.add_callback(stop)
            with pytest.raises(Interrupted):
                begun.train()
            begun.remove_callback(stop)
            begun.model.zero_grad()
        transformers.set_seed(3)
        begun.train()
        found.append(([entry["loss"] for entry in logs(begun)], weights(begun.model)))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])


@pytest.mark.parametrize("method", ["forward_kl", "okd"])
def test_a_run_resumed_at_its_end_takes_no_further_step(method: str, tmp_path: Path) -> None:
    """In the middle of an epoch, with a rate that does not fall."""
    given = {"method": method, "lr_scheduler_type": "constant", "max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        run = trainer(tmp_path, train_dataset=examples(20), **given)
        run.train(resume_from_checkpoint=resume)
        assert run.state.global_step == 3
        ends.append([weights(run.model), weights(run.teacher)])
    assert_same(ends[0], ends[1])


def test_the_best_student_comes_with_the_teacher_that_it_had(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        eval_dataset=examples(3, seed=3),
        method="okd",
        learning_rate=3.0,  # each step is worse than the one before
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        save_teacher=True,
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name != f"checkpoint-{STEPS}"
    saved = torch.load(best / "distillation.pt", weights_only=True)["teacher"]["lora"]
    assert_same(saved, run.online.state_dict()["lora"])
