"""``KDTrainer`` against a training loop in plain PyTorch, and what must hold of it whatever the method."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

import kdkernels as kd
from kdkernels.transformers import KDTrainer
from kdkernels.transformers.config import CHECKPOINTING
from kdkernels.transformers.methods import methods
from kdkernels.transformers.online import query_value_modules
from tests.support import README, oracle
from tests.support.oracle import Options
from tests.support.pages import blocks
from tests.support.tiny_models import MODELS, VOCAB, build
from tests.support.training import (
    ACCUMULATED,
    BATCH,
    STEPS,
    assert_same,
    examples,
    logs,
    models,
    padded,
    settings,
    trainer,
    weights,
    word_tokenizer,
)


def taid_t(history: list[float], steps: int, start: float, end: float, alpha: float, beta: float) -> float:
    """t after the losses so far, in plain numbers: as METHODS of the paper's code have it."""
    t, momentum, previous = start, 0.0, None
    for done, loss in enumerate(history, 1):
        if previous is not None:
            momentum = beta * momentum + (1 - beta) * (previous - loss) / (previous + 1e-15)
            step = alpha / (1 + torch.tensor(-momentum).exp().item()) * (1 - t)
            t = min(end, max(start + (end - start) * done / steps, t + step))
        previous = loss
    return t


def plain_training(
    student: Any, teacher: Any, order: list[list[list[dict[str, list[int]]]]], options: Options, *, taid: bool = False
) -> list[dict[str, float]]:
    """The steps of a run, from whole logits. order: steps of micro-batches of examples."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    history: list[float] = []
    logged = []
    for step, micro_batches in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / len(order))
        if taid:
            options = Options(**{**vars(options), "t": taid_t(history, len(order), 0.4, 1.0, 0.1, 0.9)})
        tokens = sum(int((padded(batch)[2] != -100).sum()) for batch in micro_batches)
        sums: dict[str, float] = {}
        for batch in micro_batches:
            ids, mask, following = padded(batch)
            x = student(input_ids=ids, attention_mask=mask, use_cache=False).logits
            with torch.no_grad():
                z = teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss = oracle.losses(x, z, following, None, options).sum() / tokens
            loss.backward()
            found = oracle.metrics(x.detach(), z, following, None, options)
            for name, value in {**found, "loss": loss.detach() * tokens / found["tokens"]}.items():
                sums[name] = sums.get(name, 0.0) + float(value * found["tokens"]) / tokens
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(sums["kd"] + sums["target_entropy"])
        logged.append({**sums, "t": taid_t(history, len(order), 0.4, 1.0, 0.1, 0.9)})
    return logged


def in_order(data: list[Any]) -> list[list[list[Any]]]:
    micro = [data[begin : begin + BATCH] for begin in range(0, len(data), BATCH)]
    return [micro[begin : begin + ACCUMULATED] for begin in range(0, len(micro), ACCUMULATED)]


@pytest.mark.parametrize("method", [name for name in methods() if name != "okd"])
def test_training_is_that_of_a_plain_loop_over_whole_logits(method: str, tmp_path: Path) -> None:
    data, (student, teacher) = examples(), models()
    same, _ = models()
    options = {"temperature": 1.5, "ce_weight": 0.3, "kd_weight": 0.8}
    taid = {"taid_alpha": 0.1, "taid_beta": 0.9} if method == "taid" else {}
    run = KDTrainer(student, settings(tmp_path, method=method, **options, **taid), train_dataset=data, teacher=teacher)
    run.train()
    name = "forward_kl" if method == "taid" else method
    expected = plain_training(same, teacher, in_order(data), Options(divergence=name, **options), taid=method == "taid")
    for name, tensor in same.state_dict().items():
        torch.testing.assert_close(
            student.state_dict()[name], tensor, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )
    for found, plain in zip(logs(run), expected, strict=True):
        for name in ("loss", "kd", "ce", "target_entropy", "student_entropy", "agreement", "overlap"):
            assert found[name] == pytest.approx(plain[name], rel=1e-5, abs=1e-7), name
        if method == "taid":
            assert found["t"] == pytest.approx(plain["t"], rel=1e-5)


def test_okd_trains_both_as_a_plain_loop_does(tmp_path: Path) -> None:
    """The loop has a LoRA of its own: B starts at zero, A is copied from the trainer's teacher."""
    data, (student, teacher) = examples(), models()
    same, _ = models()
    before = weights(teacher)
    run = KDTrainer(
        student,
        settings(tmp_path, method="okd", okd_teacher_alpha=0.7, temperature=1.5, okd_learning_rate=3e-2, max_grad_norm=0.05),
        train_dataset=data,
        teacher=teacher,
    )
    online = run.online
    assert online is not None
    adapters = {name: p.detach().clone() for name, p in online.model.named_parameters() if "lora_" in name}
    scale = next(module.scaling["default"] for module in online.model.modules() if hasattr(module, "lora_A"))
    run.train()

    _, plain_teacher = models()
    plain_teacher.requires_grad_(False)
    lora: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for name, down in adapters.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").split(".lora_A.")[0]
            up = adapters[name.replace("lora_A", "lora_B")]
            assert not up.any()
            lora[module] = nn.Parameter(down.double()), nn.Parameter(up.double())
    assert sorted(lora) == [f"model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qv"]
    for module, (down, up) in lora.items():
        linear = plain_teacher.get_submodule(module)
        linear.register_forward_hook(lambda _, given, out, down=down, up=up: out + scale * given[0] @ down.T @ up.T)
    learned = [parameter for pair in lora.values() for parameter in pair]
    optimizers = [
        (torch.optim.AdamW(same.parameters(), lr=1e-2, weight_decay=0.0), 1e-2, list(same.parameters())),
        (torch.optim.AdamW(learned, lr=3e-2, weight_decay=0.0), 3e-2, learned),
    ]
    options, order = Options(temperature=1.5), in_order(data)
    for step, micro_batches in enumerate(order):
        tokens = sum(int((padded(batch)[2] != -100).sum()) for batch in micro_batches)
        teacher_loss = 0.0
        for batch in micro_batches:
            ids, mask, following = padded(batch)
            x, z = (model(input_ids=ids, attention_mask=mask, use_cache=False).logits for model in (same, plain_teacher))
            theirs = oracle.teacher_losses(x, z, following, None, options, 0.7).sum() / tokens
            (oracle.losses(x, z.detach(), following, None, options).sum() / tokens + theirs).backward()
            teacher_loss += float(theirs.detach())
        for optimizer, rate, parameters in optimizers:
            nn.utils.clip_grad_norm_(parameters, 0.05)
            optimizer.param_groups[0]["lr"] = rate * (1 - step / len(order))
            optimizer.step()
            optimizer.zero_grad()
        assert logs(run)[step]["teacher_loss"] == pytest.approx(teacher_loss, rel=1e-5)

    for name, tensor in same.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)
    found = dict(online.model.named_parameters())
    for module, (down, up) in lora.items():
        prefix = f"base_model.model.{module}"
        for part, expected in (("lora_A", down), ("lora_B", up)):
            torch.testing.assert_close(found[f"{prefix}.{part}.default.weight"].double(), expected.detach(), rtol=1e-3, atol=1e-5)
    assert max(float(up.detach().abs().max()) for _, up in lora.values()) > 1e-3
    back = weights(online.unload())
    assert all(torch.equal(tensor, back[name]) for name, tensor in before.items()), "the base has moved"


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_distilled_into_itself(name: str, tmp_path: Path) -> None:
    """By OKD where the model has queries and values; the first step's loss is that of the models' own logits."""
    dropouts = ("attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout", "attention_dropout")
    dropouts += ("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout", "layerdrop")
    without = dict.fromkeys(dropouts, 0.0) if name in ("gpt2", "opt", "biogpt") else {}
    student, teacher = build(name, **without).float(), build(name, seed=1, **without).float()
    try:
        method = "okd" if query_value_modules(teacher) else "forward_kl"
    except ValueError:  # no attention: RWKV, Mamba
        method = "forward_kl"
    data = examples(2 * BATCH)
    ids, mask, following = padded(data[:BATCH])
    with torch.no_grad():
        x, z = (copy.deepcopy(model)(input_ids=ids, attention_mask=mask).logits for model in (student, teacher))
    options = Options(divergence="reverse_kl" if method == "okd" else "forward_kl")
    expected = oracle.mean(oracle.losses(x, z, following, None, options), following, None, options)
    divergence = {"divergence": "reverse_kl"} if method == "okd" else {}
    args = settings(tmp_path, method=method, max_steps=2, gradient_accumulation_steps=1, **divergence)
    before = weights(student)
    run = KDTrainer(student, args, train_dataset=data, teacher=teacher)
    run.train()
    assert logs(run)[0]["loss"] == pytest.approx(float(expected), rel=1e-3)
    after = weights(student)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in after.items())


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_evaluation_is_a_mean_over_tokens_whatever_the_batch(batch_size: int, tmp_path: Path) -> None:
    data, (student, teacher) = examples(7, seed=5), models()
    args = settings(tmp_path, method="jsd", divergence_parameter=0.3, ce_weight=0.5, per_device_eval_batch_size=batch_size)
    run = KDTrainer(student, args, eval_dataset=data, teacher=teacher)
    found = run.evaluate()
    ids, mask, following = padded(data)
    with torch.no_grad():
        x, z = (model(input_ids=ids, attention_mask=mask).logits for model in (student, teacher))
    options = Options(divergence="jsd", parameter=0.3, ce_weight=0.5)
    expected = {
        **oracle.metrics(x, z, following, None, options),
        "loss": oracle.mean(oracle.losses(x, z, following, None, options), following, None, options),
    }
    del expected["tokens"]
    for name, value in expected.items():
        assert found[f"eval_{name}"] == pytest.approx(float(value), rel=1e-6), name


@pytest.mark.parametrize("method", ["taid", "okd"])
def test_an_evaluation_moves_nothing(method: str, tmp_path: Path) -> None:
    """A run that evaluates at every step is the run that never does."""
    found = []
    for name, strategy in (("with", "steps"), ("without", "no")):
        given = {"method": method, "eval_strategy": strategy, "eval_steps": 1, "taid_alpha": 0.1}
        run = trainer(tmp_path / name, eval_dataset=examples(5, seed=3), **given)
        run.train()
        found.append([weights(run.model), {} if run.taid is None else run.taid.state_dict(), weights(run.teacher)])
    assert_same(found[0], found[1])


def test_accumulating_is_a_larger_batch(tmp_path: Path) -> None:
    """Micro-batches have different numbers of tokens; each token weighs the same."""
    found = []
    for name, batch, accumulated in (("one", 4, 1), ("four", 1, 4)):
        given = {"method": "okd", "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        student, teacher = models()
        run = trainer(tmp_path / name, student, teacher, **given)
        run.train()
        found.append((weights(student), logs(run)))
    for name, tensor in found[0][0].items():
        torch.testing.assert_close(tensor, found[1][0][name], rtol=1e-6, atol=1e-8)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_checkpointed_activations_change_nothing(tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        run = trainer(tmp_path / str(on), method="okd", **{CHECKPOINTING: on})
        run.train()
        found.append([weights(run.model), weights(run.teacher)])
    assert_same(found[0], found[1])


@pytest.mark.parametrize("method", ["forward_kl", "okd"])
def test_bfloat16_runs_the_products_in_bfloat16(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Master weights stay float32, and the loss is that of float32 within the rounding of bfloat16."""
    taken = []
    for module, name in (("fixed", "linear_kd_loss"), ("okd", "linear_okd_loss")):
        real = getattr(kd, name)

        def spy(*arguments: Any, real: Any = real, **options: Any) -> Any:
            taken.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
            return real(*arguments, **options)

        monkeypatch.setattr(f"kdkernels.transformers.methods.{module}.{name}", spy)
    losses = []
    for bf16 in (False, True):
        run = trainer(tmp_path / str(bf16), method=method, bf16=bf16)
        run.train()
        assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
        losses.append([entry["loss"] for entry in logs(run)])
    assert taken[:: len(taken) - 1] == [False, torch.bfloat16]
    assert losses[0] == pytest.approx(losses[1], rel=2**-5)
    assert losses[0] != losses[1]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # the Trainer's default, without a GPU
def test_the_run_that_the_readme_shows_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (block for language, block in blocks(README) if language == "python" and "KDTrainer(" in block)
    monkeypatch.chdir(tmp_path)
    student, teacher = models(torch.float32)
    names = {"student": student, "teacher": teacher, "tokenizer": word_tokenizer()}
    scope: dict[str, Any] = {**names, "examples": examples(32)}
    exec(block, scope)
    losses = [entry["loss"] for entry in logs(scope["trainer"])]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert transformers.AutoModelForCausalLM.from_pretrained("run").config.vocab_size == VOCAB


class NotLookedAt(torch.utils.data.Dataset[dict[str, list[int]]]):
    """A data set of a class of the user's own, which is not read before it has to be."""

    def __init__(self, examples: list[dict[str, list[int]]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        return self.examples[number]


def test_a_step_without_a_token_that_counts_has_loss_0_and_moves_no_target_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    masked = NotLookedAt([{"input_ids": one["input_ids"], "labels": [-100] * len(one["input_ids"])} for one in examples()])
    run = trainer(tmp_path, train_dataset=masked, eval_dataset=masked, method="taid", taid_t_start=0.4, taid_t_end=0.4)
    before = weights(run.model)
    run.train()
    assert [entry["loss"] for entry in logs(run)] == [0.0] * STEPS
    assert run.taid.previous.isnan()
    assert [run.evaluate()["eval_loss"] for _ in range(2)] == [0.0] * 2
    assert_same(weights(run.model), before)
    said = [record.message for record in caplog.records if "no token that counts" in record.message]
    assert [text.split(" has ")[0] for text in said] == ["A step", "An evaluation (eval)"]
