"""Weights, losses and gradients that are no numbers are named, and end a run before they are in every weight."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdkernels as kd

transformers = pytest.importorskip("transformers")

from kdkernels.cli import main  # noqa: E402
from kdkernels.transformers import KDConfig, KDTrainer, verify_lm_head, write_cache  # noqa: E402
from kdkernels.transformers.finite import NotFinite, Watch, check_weights  # noqa: E402
from kdkernels.transformers.load import load_model  # noqa: E402
from kdkernels.transformers.online import OnlineTeacher  # noqa: E402
from tests.support.data import put, tokenizer  # noqa: E402
from tests.support.tiny_models import build  # noqa: E402
from tests.support.training import ACCUMULATED, BATCH, STEPS, examples, logs, settings, weights  # noqa: E402

NAN, INFINITE = float("nan"), float("inf")
SPOTS = {  # in a row that the probe does not read, in one that every token goes through, in the head
    "model.embed_tokens.weight": (60, 3),
    "model.layers.1.mlp.up_proj.weight": (2, 1),
    "model.norm.weight": (7,),
    "lm_head.weight": (41, 0),
}


def spoiled(model: Any, name: str, value: float = NAN) -> Any:
    with torch.no_grad():
        model.get_parameter(name)[SPOTS[name]] = value
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [NAN, INFINITE, -INFINITE])
def test_a_weight_that_is_no_number_is_named(value: float, dtype: torch.dtype) -> None:
    for name in SPOTS:
        model = spoiled(build("llama").to(dtype), name, value)
        with pytest.raises(ValueError, match=rf"^the model's {name} is NaN or infinite; accepted: finite weights"):
            verify_lm_head(model)


def test_several_are_counted_and_shared_ones_once() -> None:
    model = spoiled(spoiled(build("llama_tied"), "model.norm.weight"), "model.embed_tokens.weight")
    with pytest.raises(NotFinite, match=r"the teacher's model.embed_tokens.weight is NaN .* and so is 1 more of its tensors"):
        check_weights(model, "teacher")


def test_masks_codes_and_weights_that_are_elsewhere_are_let_be() -> None:
    model = build("llama")
    model.model.register_buffer("mask", torch.full((3, 3), -INFINITE))
    model.model.register_buffer("scratch", torch.full((3,), NAN), persistent=False)
    model.model.extra = nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)
    model.model.offloaded = nn.Parameter(torch.empty(2, 2, device="meta"))
    model.model.nothing = nn.Parameter(torch.empty(0))
    check_weights(model, "model")
    model.model.register_buffer("scales", torch.full((3,), NAN))
    with pytest.raises(NotFinite, match=r"model.scales"):
        check_weights(model, "model")


@pytest.mark.parametrize("name", SPOTS)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_trainer_says_whose_weights_are_no_numbers(role: str, name: str, tmp_path: Path) -> None:
    pair = {"student": build("llama"), "teacher": build("llama", seed=1)}
    spoiled(pair[role], name)
    with pytest.raises(ValueError, match=rf"^the {role}'s {name} is NaN or infinite"):
        KDTrainer(pair["student"], settings(tmp_path), train_dataset=examples(), teacher=pair["teacher"])


def test_a_model_that_is_tried_out_for_being_causal_is_not_called_otherwise(tmp_path: Path) -> None:
    """NaN equals nothing, a token's own logits neither."""
    student = build("gpt_neox")
    student.config.is_decoder = False
    with torch.no_grad():
        student.gpt_neox.embed_in.weight[0] = NAN
    with pytest.raises(ValueError, match=r"^the student's gpt_neox.embed_in.weight is NaN or infinite"):
        KDTrainer(student, settings(tmp_path), train_dataset=examples(), teacher=build("llama", seed=1))
    student.save_pretrained(tmp_path / "saved")
    load_model(tmp_path / "saved")


@pytest.mark.parametrize("name", SPOTS)
def test_a_cache_is_not_made_of_them(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^the teacher's {name} is NaN or infinite"):
        write_cache(spoiled(build("llama"), name), examples(3), tmp_path / "cache", top_k=4)
    assert not (tmp_path / "cache").exists()


def test_a_bias_may_ban_tokens_in_the_head_and_nowhere_else(tmp_path: Path) -> None:
    """A token of logit -inf is verified as such."""
    model = build("phi")
    with torch.no_grad():
        model.lm_head.bias[5:9] = -INFINITE
    verify_lm_head(model)
    head = kd.LMHead(model.lm_head.weight, model.lm_head.bias.detach().clone())
    head.bias[9] = -INFINITE  # type: ignore[index]
    with pytest.raises(ValueError, match="the head differs: banned tokens: others have the logit -inf"):
        verify_lm_head(model, head)
    head.bias[9] = 7.0  # type: ignore[index]
    with pytest.raises(ValueError, match="the head differs: a bias"):
        verify_lm_head(model, head)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias[2] = -INFINITE
    with pytest.raises(ValueError, match=r"the student's model.layers.0.self_attn.q_proj.bias is NaN or infinite"):
        KDTrainer(model, settings(tmp_path), train_dataset=examples(), teacher=build("llama"))


def test_a_head_given_by_hand_is_looked_through_too() -> None:
    model = build("llama")
    weight = model.lm_head.weight.detach().clone()
    weight[3, 3] = NAN
    with pytest.raises(ValueError, match=r"the head given has a weight that is NaN or infinite"):
        verify_lm_head(model, kd.LMHead(weight))


def test_finite_weights_that_overflow_their_dtype_are_told_from_others() -> None:
    model = build("llama").half()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(6e4)
        model.model.layers[0].mlp.up_proj.weight.fill_(6e4)
    with pytest.raises(ValueError, match=r"the model's hidden states are NaN or infinite, .*: torch.float16 may be too narrow"):
        verify_lm_head(model)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_the_commands_say_it_in_one_line(role: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tokenizer()
    for name in ("student", "teacher"):
        model = build("llama", vocab_size=len(made), seed=len(name))
        (spoiled(model, "model.embed_tokens.weight") if name == role else model).save_pretrained(tmp_path / name)
        made.save_pretrained(tmp_path / name)
    data = put(tmp_path / "data.jsonl", *[{"text": "The cat sat on the mat."}] * 8)
    common = [f"--data={data}", f"--teacher={tmp_path / 'teacher'}", "--max-length=16"]
    distil = ["distill", *common, f"--student={tmp_path / 'student'}", "--method=forward_kl", "--steps=2"]
    runs = [distil, ["cache", *common]] if role == "teacher" else [distil]
    for number, argv in enumerate(runs):
        assert main([*argv, f"--out={tmp_path / str(number)}"]) == 2
        error = capsys.readouterr().err.strip()
        assert re.search(rf"the {role}'s model.embed_tokens.weight is NaN or infinite", error.splitlines()[-1])
        assert "Traceback" not in error


# a step


class At(transformers.TrainerCallback):  # type: ignore[misc]
    """Does something before a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step + 1 == self.step:
            self.action()


def of_one_token(model: Any, token: int, hook: Any) -> None:
    """hook: what becomes of the states of a row that has the token, (S, D)."""

    def apply(_: Any, given: tuple[Any, ...], output: Tensor) -> Tensor:
        rows = (given[0] == token).any(-1)
        changed = output.clone()
        changed[rows] = hook(output[rows])
        return changed

    model.get_input_embeddings().register_forward_hook(apply)


def marked(data: list[dict[str, Any]], row: int, token: int) -> list[dict[str, Any]]:
    """The data with a token that no other example has, as the first of one row."""
    other = [{key: [5 if x == token else x for x in values] for key, values in one.items()} for one in data]
    other[row]["input_ids"][0] = token
    return other


class Backwards(torch.autograd.Function):
    """The identity, with a gradient of its own."""

    @staticmethod
    def forward(_: Any, x: Tensor, factor: float) -> Tensor:
        Backwards.factor = factor
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * Backwards.factor, None


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
@pytest.mark.parametrize("method", ["forward_kl", "taid", "okd"])
def test_a_step_without_numbers_ends_the_run_and_moves_nothing(method: str, wrong: str, tmp_path: Path) -> None:
    """The step, the micro-batch and the rows are named; weights, checkpoint and the student that was saved are those before it."""
    row = (ACCUMULATED + 1) * BATCH  # the first of the second micro-batch of the second step
    data = marked(examples(), row, 60)
    student, teacher = build("llama"), build("llama", seed=1)
    hook = (lambda states: states * NAN) if wrong == "loss" else (lambda states: Backwards.apply(states, INFINITE))
    of_one_token(student, 60, hook)
    args = settings(tmp_path, method=method, save_strategy="steps", save_steps=1, logging_nan_inf_filter=True)
    trainer = KDTrainer(student, args, train_dataset=data, teacher=teacher)
    kept: dict[str, Tensor] = {}
    trainer.add_callback(At(2, lambda: kept.update({**weights(student), **weights(trainer.teacher)})))
    what = "the loss is nan" if wrong == "loss" else "the norm of the gradients is (nan|inf)"
    with pytest.raises(ValueError, match=rf"{what} at step 2; a smaller learning rate .* micro-batch 2 of 2") as raised:
        trainer.train()
    assert str(data[row]["input_ids"][:8]).rstrip("]") in str(raised.value)
    if wrong == "loss":
        assert "micro-batch 1" not in str(raised.value)
    now = {**weights(student), **weights(trainer.teacher)}
    assert all(torch.equal(tensor, now[name]) for name, tensor in kept.items())
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_teacher_whose_gradients_are_no_numbers_takes_no_step(tmp_path: Path) -> None:
    student, teacher = build("llama"), build("llama", seed=1)
    teacher.model.layers[1].self_attn.o_proj.register_forward_hook(lambda _, __, out: Backwards.apply(out, NAN))
    trainer = KDTrainer(student, settings(tmp_path, method="okd"), train_dataset=examples(), teacher=teacher)
    before = {**weights(student), **weights(trainer.teacher)}
    with pytest.raises(ValueError, match=r"the norm of the teacher's gradients is nan at step 1; .* micro-batch 1 of 2"):
        trainer.train()
    now = {**weights(student), **weights(trainer.teacher)}
    assert all(torch.equal(tensor, now[name]) for name, tensor in before.items())


def test_an_online_teacher_alone_takes_none_either() -> None:
    teacher = OnlineTeacher(build("llama"), rank=2)
    teacher.optimize_with(torch.optim.AdamW, {}, 1e-2)
    before = {name: parameter.detach().clone() for name, parameter in teacher.named_parameters().items()}
    for parameter in teacher.parameters():
        parameter.grad = torch.full_like(parameter, INFINITE)
    with pytest.raises(NotFinite, match=r"the norm of the teacher's gradients is (inf|nan)"):
        teacher.step(1.0, 1.0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in teacher.named_parameters().items())


def test_a_learning_rate_that_breaks_the_weights_is_named_with_them(tmp_path: Path) -> None:
    """They are not saved over what is there, and the run does not end as if all were well."""
    data = examples()
    for steps, message in (
        (STEPS, r"at step 2; the step before has left the student where \S+ is NaN or infinite.*; a smaller learning rate"),
        (1, r"the student's \S+ is NaN or infinite"),
    ):
        student = build("llama")
        args = settings(tmp_path / str(steps), learning_rate=1e39, max_grad_norm=0.0, max_steps=steps)
        trainer = KDTrainer(student, args, train_dataset=data, teacher=build("llama", seed=1))
        trainer.save_model(str(tmp_path / "student"))
        with pytest.raises(ValueError, match=message):
            trainer.train()
        with pytest.raises(ValueError, match=r"the student's \S+ is NaN or infinite"):
            trainer.save_model(str(tmp_path / "student"))
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
        check_weights(saved, "student")


def test_broken_weights_become_no_checkpoint(tmp_path: Path) -> None:
    student = build("llama")
    args = settings(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1)
    trainer = KDTrainer(student, args, train_dataset=examples(), teacher=build("llama", seed=1))

    class Break(transformers.TrainerCallback):  # type: ignore[misc]
        def on_optimizer_step(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == 1:
                spoiled(student, "model.norm.weight")

    trainer.add_callback(Break())
    with pytest.raises(ValueError, match=r"the student's model.norm.weight is NaN"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_student_that_can_no_longer_write_is_told_from_other_errors(tmp_path: Path) -> None:
    student = build("llama")
    args = settings(tmp_path, on_policy_fraction=1.0, on_policy_max_new_tokens=3)
    trainer = KDTrainer(student, args, train_dataset=examples(), teacher=build("llama", seed=1))
    handle: list[Any] = []
    hook = lambda _, __, out: out * NAN  # noqa: E731
    trainer.add_callback(At(1, lambda: handle.append(student.model.norm.register_forward_hook(hook))))
    with pytest.raises(ValueError, match=r"the loss is nan at step 1"):
        trainer.train()
    with pytest.raises(ValueError, match=r"the student writes by probabilities that are nan at step 1; .* before its first batch"):
        trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    handle[0].remove()
    spoiled(student, "lm_head.weight")
    with pytest.raises(ValueError, match=r"the student's lm_head.weight is NaN"):
        trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))


@pytest.mark.parametrize("scale", [2.0**127, 1.0])
def test_a_scaler_may_leave_steps_out_as_long_as_a_smaller_scale_can_help(scale: float, tmp_path: Path) -> None:
    student = build("llama")
    trainer = KDTrainer(student, settings(tmp_path, max_grad_norm=0.0), train_dataset=examples(), teacher=build("llama", seed=1))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-120)
    before = weights(student)
    if scale > 1:
        trainer.train()
        assert not math.isfinite(logs(trainer)[0]["grad_norm"])
        assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(student).items())
    else:
        student.model.norm.register_forward_hook(lambda _, __, out: out * NAN)
        with pytest.raises(ValueError, match="the loss is nan at step 1"):
            trainer.train()


def test_an_evaluation_without_numbers_names_the_batch(tmp_path: Path) -> None:
    data = marked(examples(5), 3, 60)
    student = build("llama")
    of_one_token(student, 60, lambda states: states * NAN)
    args = settings(tmp_path, per_device_eval_batch_size=2)
    trainer = KDTrainer(student, args, eval_dataset=data, teacher=build("llama", seed=1))
    begun = re.escape(str(data[3]["input_ids"][:8]).rstrip("]"))
    with pytest.raises(ValueError, match=rf"eval_loss is nan after 0 steps; batch 2 of 3, whose rows begin with .*{begun}"):
        trainer.evaluate()


# gradients


def test_a_student_that_no_gradient_reaches_is_refused(tmp_path: Path) -> None:
    """Whether nothing before the loss takes part in it, or what takes part is not what is to be trained."""
    for trained in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.post_attention_layernorm.weight"):
        student = build("llama").requires_grad_(False)
        student.get_parameter(trained).requires_grad_(True)
        student.model.layers[0].register_forward_hook(lambda _, __, out: out.detach())
        trainer = KDTrainer(student, settings(tmp_path), train_dataset=examples(), teacher=build("llama", seed=1))
        with pytest.raises(ValueError, match=rf"no gradient reaches the student: none of its 1 parameters .*, {trained} for one"):
            trainer.train()
    student = build("llama").requires_grad_(False)
    student.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    student.model.layers[0].mlp.register_forward_hook(lambda _, __, out: out.detach())
    student.enable_input_require_grads()  # as is done for LoRA on a quantised model
    trainer = KDTrainer(student, settings(tmp_path), train_dataset=examples(), teacher=build("llama", seed=1))
    with pytest.raises(ValueError, match=r"no gradient reaches the student: none of its 1 parameters"):
        trainer.train()


def test_gradients_that_are_all_0_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs: dict[str, dict[str, Any]] = {
        "no weight": {"kd_weight": 0.0, "ce_weight": 0.0},
        "itself": {},
        "learns": {},
        "nothing counts at first": {},
    }
    for name, given in runs.items():
        data = examples()
        if name == "nothing counts at first":
            for one in data[: ACCUMULATED * BATCH]:
                one["labels"] = [-100] * len(one["labels"])
        caplog.clear()
        teacher = build("llama", seed=1)
        trainer = KDTrainer(build("llama"), settings(tmp_path / name, **given), train_dataset=data, teacher=teacher)
        with caplog.at_level(logging.WARNING, logger="kdkernels.transformers.finite"):
            trainer.train()
        said = [record.getMessage() for record in caplog.records if "All gradients of the student are 0" in record.getMessage()]
        assert len(said) == (name == "no weight"), name


def test_a_step_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of its micro-batches."""
    read: list[str] = []
    for name in ("tolist", "item", "__float__", "__bool__", "__int__"):
        real = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *given, real=real, name=name: read.append(name) or real(self, *given))
    watch = Watch(build("llama"), keeps_gradients=True)
    for micro in range(3):
        watch.add(torch.ones((), requires_grad=True) * micro, torch.ones(2, 5, dtype=torch.long), torch.tensor(4))
    assert not read
    watch.check(1, torch.ones(()), None)
    assert read == ["tolist"]


def test_the_settings_still_have_the_trainers_own_filter(tmp_path: Path) -> None:
    """It is about what is logged: with it or without, a loss that is no number ends the run."""
    for kept in (True, False):
        student = build("llama")
        of_one_token(student, 60, lambda states: states * NAN)
        args: KDConfig = settings(tmp_path, logging_nan_inf_filter=kept)
        data = [{"input_ids": [60, 6, 7]}] * 8
        with pytest.raises(NotFinite, match="the loss is nan at step 1"):
            KDTrainer(student, args, train_dataset=data, teacher=build("llama", seed=1)).train()
