"""``KDTrainer`` against a training loop in plain PyTorch, and what must hold of it: evaluation, resumption, accumulation, ranks."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdkernels as kd
from tests.support import README, oracle
from tests.support.oracle import Options

transformers = pytest.importorskip("transformers")

from kdkernels.transformers import KDConfig, KDTrainer, TopKCache, hidden_states, write_cache  # noqa: E402
from kdkernels.transformers.methods import methods  # noqa: E402
from kdkernels.transformers.online import query_value_modules  # noqa: E402
from tests.support.tiny_models import MODELS, VOCAB, build  # noqa: E402
from tests.transformers.test_cache import as_version_1  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

STEPS, ACCUMULATED, BATCH = 4, 2, 2


def models(dtype: torch.dtype = torch.float64, **more: Any) -> tuple[Any, Any]:
    """A student and a teacher of another width."""
    return build("llama", **more).to(dtype), build("llama", seed=1, hidden_size=24, intermediate_size=40, **more).to(dtype)


def examples(count: int = STEPS * ACCUMULATED * BATCH, seed: int = 0) -> list[dict[str, list[int]]]:
    """Sequences of different lengths whose prompts of different lengths do not count."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length, prompt = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((5, 12), (1, 4)))
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def settings(folder: Path, **more: Any) -> KDConfig:
    given = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATED,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",  # a loop beside it then sees the same
        "okd_lora_rank": 4,
    }
    return KDConfig(**{**given, **more})


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def logs(trainer: KDTrainer) -> list[dict[str, float]]:
    """What was logged at the steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def padded(batch: list[dict[str, list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and the token to predict at each position."""
    longest = max(len(one["input_ids"]) for one in batch)
    ids, mask = torch.zeros(len(batch), longest, dtype=torch.long), torch.zeros(len(batch), longest, dtype=torch.long)
    following = torch.full((len(batch), longest), -100)
    for row, one in enumerate(batch):
        length = len(one["input_ids"])
        ids[row, :length], mask[row, :length] = torch.tensor(one["input_ids"]), 1
        following[row, : length - 1] = torch.tensor(one["labels"][1:])
    return ids, mask, following


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
    trainer = KDTrainer(student, settings(tmp_path, method=method, **options, **taid), train_dataset=data, teacher=teacher)
    trainer.train()
    name = "forward_kl" if method == "taid" else method
    expected = plain_training(same, teacher, in_order(data), Options(divergence=name, **options), taid=method == "taid")
    for name, tensor in same.state_dict().items():
        torch.testing.assert_close(
            student.state_dict()[name], tensor, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )
    for found, plain in zip(logs(trainer), expected, strict=True):
        for name in ("loss", "kd", "ce", "target_entropy", "student_entropy", "agreement", "overlap"):
            assert found[name] == pytest.approx(plain[name], rel=1e-5, abs=1e-7), name
        if method == "taid":
            assert found["t"] == pytest.approx(plain["t"], rel=1e-5)


def test_okd_trains_both_as_a_plain_loop_does(tmp_path: Path) -> None:
    """The loop has a LoRA of its own: B starts at zero, A is copied from the trainer's teacher."""
    data, (student, teacher) = examples(), models()
    same, _ = models()
    before = weights(teacher)
    trainer = KDTrainer(
        student,
        settings(tmp_path, method="okd", okd_teacher_alpha=0.7, temperature=1.5, okd_learning_rate=3e-2, max_grad_norm=0.05),
        train_dataset=data,
        teacher=teacher,
    )
    online = trainer.online
    assert online is not None
    adapters = {name: p.detach().clone() for name, p in online.model.named_parameters() if "lora_" in name}
    scale = next(module.scaling["default"] for module in online.model.modules() if hasattr(module, "lora_A"))
    trainer.train()

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
        assert logs(trainer)[step]["teacher_loss"] == pytest.approx(teacher_loss, rel=1e-5)

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
    trainer = KDTrainer(student, args, train_dataset=data, teacher=teacher)
    trainer.train()
    assert logs(trainer)[0]["loss"] == pytest.approx(float(expected), rel=1e-3)
    after = weights(student)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in after.items())


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_evaluation_is_a_mean_over_tokens_whatever_the_batch(batch_size: int, tmp_path: Path) -> None:
    data, (student, teacher) = examples(7, seed=5), models()
    args = settings(tmp_path, method="jsd", divergence_parameter=0.3, ce_weight=0.5, per_device_eval_batch_size=batch_size)
    trainer = KDTrainer(student, args, eval_dataset=data, teacher=teacher)
    found = trainer.evaluate()
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
        student, teacher = models(torch.float32)
        args = settings(tmp_path / name, method=method, eval_strategy=strategy, eval_steps=1, taid_alpha=0.1)
        trainer = KDTrainer(student, args, train_dataset=examples(), eval_dataset=examples(5, seed=3), teacher=teacher)
        trainer.train()
        state = {} if trainer.taid is None else trainer.taid.state_dict()
        found.append({**weights(student), **state, **(weights(trainer.teacher) if method == "okd" else {})})
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


RUNS = {
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


@pytest.mark.parametrize("run", RUNS)
def test_an_interrupted_run_is_the_uninterrupted_one(run: str, tmp_path: Path) -> None:
    """Dropout in the student, too: the random numbers go on where they were."""

    def trainer(folder: str, student: Any, **more: Any) -> KDTrainer:
        args = settings(tmp_path / folder, save_strategy="steps", save_steps=1, seed=7, **RUNS[run], **more)
        return KDTrainer(
            student, args, train_dataset=examples(20), eval_dataset=examples(3, seed=3), teacher=models(torch.float32)[1]
        )

    whole, _ = models(torch.float32, attention_dropout=0.3)
    straight = trainer("whole", whole, max_steps=6)
    straight.train()

    class Stop(transformers.TrainerCallback):
        def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == 3:
                raise Interrupted

    first, _ = models(torch.float32, attention_dropout=0.3)
    cut = trainer("cut", first, max_steps=6)
    cut.add_callback(Stop())
    with pytest.raises(Interrupted):
        cut.train()
    again, _ = models(torch.float32, attention_dropout=0.3)
    resumed = trainer("cut", again, max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))

    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(whole).items())
    if straight.taid is not None:
        assert all(torch.equal(value, resumed.taid.state_dict()[name]) for name, value in straight.taid.state_dict().items())
    if straight.online is not None:
        theirs = weights(resumed.teacher)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(straight.teacher).items())
    drop = ("epoch", "total_flos", "train_runtime")
    for entry, other in zip(logs(straight)[3:], logs(resumed)[3:], strict=True):
        assert {k: v for k, v in entry.items() if k not in drop} == {k: v for k, v in other.items() if k not in drop}


def test_a_run_with_students_writing_goes_on_from_one_without_only_by_saying_so(tmp_path: Path) -> None:
    student, teacher = models(torch.float32)
    given = {"save_strategy": "steps", "save_steps": 2, "on_policy_max_new_tokens": 4}
    KDTrainer(student, settings(tmp_path, **given), train_dataset=examples(), teacher=teacher).train()
    trainer = KDTrainer(student, settings(tmp_path, on_policy_fraction=0.5, **given), train_dataset=examples(), teacher=teacher)
    with pytest.raises(ValueError, match=r"has no on_policy_0.pt: its run had no on_policy_fraction"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_accumulating_is_a_larger_batch(tmp_path: Path) -> None:
    """Micro-batches have different numbers of tokens; each token weighs the same."""
    found = []
    for name, batch, accumulated in (("one", 4, 1), ("four", 1, 4)):
        student, teacher = models()
        args = settings(tmp_path / name, method="okd", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated)
        trainer = KDTrainer(student, args, train_dataset=examples(), teacher=teacher)
        trainer.train()
        found.append((weights(student), logs(trainer)))
    for name, tensor in found[0][0].items():
        torch.testing.assert_close(tensor, found[1][0][name], rtol=1e-6, atol=1e-8)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_checkpointed_activations_change_nothing(tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        student, teacher = models(torch.float32)
        args = settings(tmp_path / str(on), method="okd", activation_checkpointing=on)
        trainer = KDTrainer(student, args, train_dataset=examples(), teacher=teacher)
        trainer.train()
        found.append({**weights(student), **weights(trainer.teacher)})
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


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
        student, teacher = models(torch.float32)
        trainer = KDTrainer(
            student, settings(tmp_path / str(bf16), method=method, bf16=bf16), train_dataset=examples(), teacher=teacher
        )
        trainer.train()
        assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
        losses.append([entry["loss"] for entry in logs(trainer)])
    assert taken[:: len(taken) - 1] == [False, torch.bfloat16]
    assert losses[0] == pytest.approx(losses[1], rel=2**-5)
    assert losses[0] != losses[1]


def test_only_the_student_is_saved_unless_asked(tmp_path: Path) -> None:
    for asked in (False, True):
        student, teacher = models(torch.float32)
        folder = tmp_path / str(asked)
        trainer = KDTrainer(student, settings(folder, method="okd", save_teacher=asked), train_dataset=examples(), teacher=teacher)
        trainer.train()
        trainer.save_model()
        again = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert all(torch.equal(tensor, weights(student)[name]) for name, tensor in weights(again).items())
        assert (folder / "teacher").exists() == asked
        if asked:
            peft = pytest.importorskip("peft")
            _, base = models(torch.float32)
            online = peft.PeftModel.from_pretrained(base, folder / "teacher")
            ids = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
            with torch.no_grad():
                assert torch.equal(hidden_states(online, ids), hidden_states(trainer.teacher.eval(), ids))


def test_padded_vocabularies_are_cut_without_being_told(tmp_path: Path) -> None:
    student, teacher = build("llama").float(), build("llama", seed=1, vocab_size=VOCAB + 19).float()
    trainer = KDTrainer(student, settings(tmp_path), train_dataset=examples(), teacher=teacher)
    assert trainer.vocab_size == VOCAB
    trainer.train()


def test_the_heads_are_verified_before_anything_else(tmp_path: Path) -> None:
    class Scaled(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *arguments: Any, **options: Any) -> Any:
            out = super().forward(*arguments, **options)
            out.logits = out.logits * 0.5
            return out

    odd, plain = build("llama", Scaled).float(), build("llama", seed=1).float()
    for student, teacher in ((odd, plain), (plain, odd)):
        with pytest.raises(ValueError, match=r"another logit scale: the model multiplies the head's output by 0.5"):
            KDTrainer(student, settings(tmp_path), train_dataset=examples(), teacher=teacher)


@pytest.mark.parametrize("method", ["forward_kl", "taid"])
def test_a_cached_teacher_teaches_what_the_model_would(method: str, tmp_path: Path) -> None:
    """With every token listed nothing is lost: not in training, not in evaluation, and the data may be left to the cache."""
    data, held_out = examples(), examples(5, seed=3)
    _, teacher = models(torch.float32)
    options = {"method": method, "temperature": 1.5, "ce_weight": 0.2, "taid_alpha": 0.1}
    write_cache(teacher, [*data, *held_out], tmp_path / "cache", top_k=VOCAB, temperature=1.5)
    runs = []
    for name, given in (("model", teacher), ("folder", str(tmp_path / "cache")), ("cache", TopKCache(tmp_path / "cache"))):
        student, _ = models(torch.float32)
        args = settings(tmp_path / name, **options)
        trainer = KDTrainer(student, args, train_dataset=data, eval_dataset=held_out, teacher=given)
        trainer.train()
        runs.append((weights(student), logs(trainer), trainer.evaluate()))
    for state, logged, evaluated in runs[1:]:
        for name, tensor in runs[0][0].items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=2e-4)
        for one, other in zip(logged, runs[0][1], strict=True):
            assert one == pytest.approx(other, rel=1e-3)
        for name in ("eval_loss", "eval_kd", "eval_ce", "eval_agreement"):
            assert evaluated[name] == pytest.approx(runs[0][2][name], rel=1e-3)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_few_tokens_of_a_cached_teacher_teach_too(tail: str, tmp_path: Path) -> None:
    """Trained on the cache's own examples, the student's held-out loss against the teacher itself falls."""
    student, teacher = models(torch.float32)
    write_cache(teacher, examples(16), tmp_path / "cache", top_k=8)
    found = []
    args = settings(tmp_path / "run", topk_tail=tail, max_steps=20, learning_rate=3e-2)
    trainer = KDTrainer(student, args, teacher=tmp_path / "cache")
    judge = KDTrainer(student, settings(tmp_path / "judge"), eval_dataset=examples(16), teacher=teacher)
    for run in (lambda: None, trainer.train):
        run()
        found.append(judge.evaluate()["eval_kd"])
    assert found[1] < 0.7 * found[0]


@pytest.mark.parametrize("version", [1, 2])
def test_a_confident_teacher_teaches_from_a_cache_what_it_teaches_itself(version: int, tmp_path: Path) -> None:
    """reverse_kl, of which an outcome without mass is no divergence: it fell while the one against the teacher itself rose."""
    student, teacher = models(torch.float32)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(100)
    write_cache(teacher, examples(16), tmp_path / "cache", top_k=8)
    if version == 1:
        as_version_1(tmp_path / "cache")
    args = settings(tmp_path / "run", method="reverse_kl", max_steps=30, learning_rate=3e-2)
    trainer = KDTrainer(student, args, teacher=tmp_path / "cache", eval_dataset=examples(16))
    judge = KDTrainer(student, settings(tmp_path / "judge", method="reverse_kl"), eval_dataset=examples(16), teacher=teacher)
    found = []
    for run in (lambda: None, trainer.train):
        run()
        found.append((judge.evaluate()["eval_kd"], trainer.evaluate()["eval_kd"]))
    assert min(found[1]) >= 0
    assert found[1][0] < 0.7 * found[0][0], "the true divergence"
    assert found[1][1] < 0.7 * found[0][1], "the one that the cache gives"


def test_what_a_cached_teacher_cannot_do_is_refused(tmp_path: Path) -> None:
    student, teacher = models(torch.float32)
    folder = tmp_path / "cache"
    write_cache(teacher, examples(4), folder, top_k=4)
    for given, message in (
        ({"method": "okd"}, "method 'okd' trains the teacher along, but the teacher given is a cache"),
        ({"on_policy_fraction": 0.5}, "on_policy_fraction needs a teacher that can judge new text"),
        ({"temperature": 2.0}, "temperature=2.0, but the cache was made for 1.0"),
        ({"method": "reverse_kl", "topk_tail": "renormalize"}, "reverse_kl moves mass outside the top-k"),
    ):
        with pytest.raises(ValueError, match=message):
            KDTrainer(student, settings(tmp_path, **given), train_dataset=examples(), teacher=folder)
    trainer = KDTrainer(student, settings(tmp_path), train_dataset=examples(4, seed=9), teacher=folder)
    with pytest.raises(ValueError, match="is not in the cache"):
        trainer.train()


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # the Trainer's default, without a GPU
def test_the_run_that_the_readme_shows_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "KDTrainer(" in block)
    monkeypatch.chdir(tmp_path)
    student, teacher = models(torch.float32)
    names = {"student": student, "teacher": teacher, "tokenizer": tokenizer([f"w{number}" for number in range(VOCAB)])}
    scope: dict[str, Any] = {**names, "examples": examples(32)}
    exec(block, scope)
    losses = [entry["loss"] for entry in logs(scope["trainer"])]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert transformers.AutoModelForCausalLM.from_pretrained("run").config.vocab_size == VOCAB


def test_a_cache_of_a_teacher_with_more_rows_leaves_them_to_the_rest(tmp_path: Path) -> None:
    """The most likely tokens of a padded teacher may be ones that the student has no row for."""
    student, teacher = build("llama").float(), build("llama", seed=1, vocab_size=VOCAB + 40).float()
    data = examples()
    cache = write_cache(teacher, data, tmp_path / "cache", top_k=16)
    assert any(bool((cache.lookup(one["input_ids"])[0] >= VOCAB).any()) for one in data)
    trainer = KDTrainer(student, settings(tmp_path / "run"), train_dataset=data, teacher=cache)
    before = weights(student)
    trainer.train()
    assert all(entry["loss"] > 0 for entry in logs(trainer))
    assert not torch.equal(weights(student)["lm_head.weight"], before["lm_head.weight"])


def test_a_second_run_of_taid_starts_where_the_first_did(tmp_path: Path) -> None:
    student, teacher = models(torch.float32)
    trainer = KDTrainer(student, settings(tmp_path, method="taid"), train_dataset=examples(), teacher=teacher)
    ts = []
    for _ in range(2):
        trainer.train()
        ts.append([entry["t"] for entry in logs(trainer)])
    assert ts[0] == pytest.approx(ts[1], abs=1e-3)
    assert ts[0][0] < 0.6


class Interrupted(Exception):
    pass


class StopAtSubstep(transformers.TrainerCallback):  # type: ignore[misc]
    """Between a backward and the step."""

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        raise Interrupted


@pytest.mark.parametrize("run", ["okd", "taid", "gkd"])
def test_an_aborted_run_leaves_nothing_to_the_next(run: str, tmp_path: Path) -> None:
    found = []
    for aborted in (False, True):
        student, teacher = models(torch.float32)
        args = settings(tmp_path / str(aborted), **RUNS[run], seed=3)
        trainer = KDTrainer(student, args, train_dataset=examples(), teacher=teacher)
        if aborted:
            stop = StopAtSubstep()
            trainer.add_callback(stop)
            with pytest.raises(Interrupted):
                trainer.train()
            trainer.remove_callback(stop)
            student.zero_grad()
        transformers.set_seed(3)
        trainer.train()
        found.append((logs(trainer), weights(student)))
    assert [entry["loss"] for entry in found[0][0]] == [entry["loss"] for entry in found[1][0]]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


@pytest.mark.parametrize("method", ["forward_kl", "okd"])
def test_a_run_resumed_at_its_end_takes_no_further_step(method: str, tmp_path: Path) -> None:
    """In the middle of an epoch, with a rate that does not fall."""
    given = {"method": method, "lr_scheduler_type": "constant", "max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        student, teacher = models(torch.float32)
        trainer = KDTrainer(student, settings(tmp_path, **given), train_dataset=examples(20), teacher=teacher)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == 3
        ends.append({**weights(student), **weights(trainer.teacher)})
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_the_best_student_comes_with_the_teacher_that_it_had(tmp_path: Path) -> None:
    student, teacher = models(torch.float32)
    args = settings(
        tmp_path,
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
    trainer = KDTrainer(student, args, train_dataset=examples(), eval_dataset=examples(3, seed=3), teacher=teacher)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != f"checkpoint-{STEPS}"
    saved = torch.load(best / "distillation.pt", weights_only=True)["teacher"]["lora"]
    assert all(torch.equal(tensor, trainer.online.state_dict()["lora"][name]) for name, tensor in saved.items())


def test_a_padding_token_that_only_the_student_has_reaches_no_teacher(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(VOCAB)]
    ours = tokenizer(words)
    ours.pad_token = words[-1]
    student, teacher = build("llama").float(), build("llama", seed=1, vocab_size=VOCAB - 1).float()
    data = [{**one, "input_ids": [min(token, VOCAB - 2) for token in one["input_ids"]]} for one in examples()]
    data = [{**one, "labels": [min(label, VOCAB - 2) for label in one["labels"]]} for one in data]
    for name, fraction in (("data", 0.0), ("written", 1.0)):
        trainer = KDTrainer(
            student,
            settings(tmp_path / name, on_policy_fraction=fraction, on_policy_max_new_tokens=4),
            train_dataset=data,
            teacher=teacher,
            processing_class=ours,
            teacher_processing_class=tokenizer(words[:-1]),
        )
        assert trainer.vocab_size == VOCAB - 1
        trainer.train()


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
    student, teacher = models(torch.float32)
    args = settings(tmp_path, method="taid", taid_t_start=0.4, taid_t_end=0.4)
    trainer = KDTrainer(student, args, train_dataset=masked, eval_dataset=masked, teacher=teacher)
    before = weights(student)
    trainer.train()
    assert [entry["loss"] for entry in logs(trainer)] == [0.0] * STEPS
    assert trainer.taid.previous.isnan()
    assert [trainer.evaluate()["eval_loss"] for _ in range(2)] == [0.0] * 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(student).items())
    said = [record.message for record in caplog.records if "no token that counts" in record.message]
    assert [text.split(" has ")[0] for text in said] == ["A step", "An evaluation (eval)"]


def test_data_without_a_token_to_learn_is_refused_and_held_out_data_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student, teacher = models()
    nothing = [
        {"input_ids": [3, 4, 5], "labels": [-100] * 3},
        {"input_ids": [3, 4], "labels": [3, -100]},  # the first is never predicted
        {"input_ids": [0, 3], "attention_mask": [0, 1], "labels": [-100, 3]},
    ]
    with pytest.raises(ValueError, match="train_dataset has no examples; accepted: at least one"):
        KDTrainer(student, settings(tmp_path), train_dataset=[], teacher=teacher)
    with pytest.raises(ValueError, match="train_dataset has 3 examples and not one token to learn"):
        KDTrainer(student, settings(tmp_path), train_dataset=nothing, teacher=teacher)
    KDTrainer(student, settings(tmp_path), train_dataset=[*nothing, *examples()], eval_dataset={"a": nothing}, teacher=teacher)
    assert "eval_dataset['a'] has 3 examples and not one token to learn" in caplog.text


def test_students_write_no_token_that_no_tokenizer_has(tmp_path: Path) -> None:
    """Both heads are padded, by different numbers of rows."""
    words = [f"w{number}" for number in range(VOCAB - 11)]
    student, teacher = build("llama").float(), build("llama", seed=1, vocab_size=VOCAB + 3).float()
    given = {"on_policy_fraction": 1.0, "on_policy_max_new_tokens": 12, "on_policy_temperature": 4.0}
    args = settings(tmp_path, **given)
    data = [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}] * 16
    one = tokenizer(words)
    trainer = KDTrainer(
        student, args, train_dataset=data, teacher=teacher, processing_class=one, teacher_processing_class=tokenizer(words)
    )
    assert trainer.vocab_size == VOCAB
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 4, torch.device("cpu"))
    written = torch.cat([batch["input_ids"][batch["labels"] != -100] for batch in batches])
    assert len(written) > 50
    assert int(written.max()) < len(words)


def tokenizer(words: list[str]) -> Any:
    """One token for each word."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), unk_token=words[0])


def test_tokenizers_that_number_tokens_differently_are_refused(tmp_path: Path) -> None:
    """Of one size, with one pair of tokens exchanged; whether they are given, lie beside the model or in the cache."""
    words = [f"w{number}" for number in range(VOCAB)]
    ours, theirs = tokenizer(words), tokenizer([*words[:7], words[8], words[7], *words[9:]])
    student, teacher = models(torch.float32)
    message = "disagree on 2 of their tokens, the first: 'w7' is 7 in the student's and 8 in the teacher's"
    with pytest.raises(ValueError, match=message):
        KDTrainer(student, settings(tmp_path), teacher=teacher, processing_class=ours, teacher_processing_class=theirs)
    KDTrainer(student, settings(tmp_path), teacher=teacher, processing_class=ours, teacher_processing_class=tokenizer(words))

    teacher.save_pretrained(tmp_path / "teacher")
    theirs.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=message):
        KDTrainer(student, settings(tmp_path), teacher=str(tmp_path / "teacher"), processing_class=ours)
    write_cache(teacher, examples(4), tmp_path / "cache", top_k=4)
    theirs.save_pretrained(tmp_path / "cache" / "tokenizer")
    with pytest.raises(ValueError, match=message):
        KDTrainer(student, settings(tmp_path), teacher=tmp_path / "cache", processing_class=ours)


def test_a_token_that_only_the_student_has_is_cut_and_padding_alike_in_both_is_not(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(VOCAB)]
    student, teacher = models(torch.float32)
    for count, expected in ((VOCAB, VOCAB - 5), (VOCAB - 5, None)):
        trainer = KDTrainer(
            student,
            settings(tmp_path),
            teacher=teacher,
            processing_class=tokenizer(words[:count]),
            teacher_processing_class=tokenizer(words[: VOCAB - 5]),
        )
        assert trainer.vocab_size == expected


def test_renamed_tokens_are_trained_with_a_vocab_size_over_both_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a live teacher and with a cached one; the loss is that of the same tokenizer on both sides."""
    words = [f"w{number}" for number in range(VOCAB)]
    ours, theirs = tokenizer(words), tokenizer([*words[:-2], "<|User|>", "<|Bot|>"])
    student, teacher = models(torch.float32)
    cache = write_cache(teacher, examples(4), tmp_path / "cache", top_k=4).folder
    theirs.save_pretrained(cache / "tokenizer")
    for one, given in ((teacher, theirs), (cache, None)):
        tokenizers = {"processing_class": ours, "teacher_processing_class": given}
        with pytest.raises(ValueError, match=r"disagree on 4 .*; or vocab_size \(--vocab-size\): 61 takes .* and 59 leaves"):
            KDTrainer(student, settings(tmp_path), teacher=one, **tokenizers)
        caplog.clear()
        args = settings(tmp_path, vocab_size=VOCAB)
        trainer = KDTrainer(student, args, eval_dataset=examples(4), teacher=one, **tokenizers)
        assert [record.message for record in caplog.records] == [
            "vocab_size=61 takes 2 tokens of student and teacher for one another that have other names: 59 is 'w59' in the "
            "student's and '<|User|>' in the teacher's, 60 is 'w60' in the student's and '<|Bot|>' in the teacher's"
        ]
        (tmp_path / "cache" / "tokenizer").rename(tmp_path / "away")
        same = KDTrainer(student, settings(tmp_path), eval_dataset=examples(4), teacher=one, processing_class=ours)
        (tmp_path / "away").rename(tmp_path / "cache" / "tokenizer")
        assert trainer.evaluate()["eval_loss"] == same.evaluate()["eval_loss"]


@pytest.mark.parametrize("cached", [False, True])
def test_words_that_the_teacher_has_more_are_named_when_the_heads_are_cut(
    cached: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [f"w{number}" for number in range(VOCAB + 500)]
    student, teacher = build("llama").float(), build("llama", seed=1, vocab_size=len(words)).float()
    one: Any = write_cache(teacher, examples(4), tmp_path / "cache", top_k=4) if cached else teacher
    for count, said in (
        (VOCAB, "the teacher's tokenizer has 500 more tokens than the student's, behind the 61 of both: 'w61' (61), "),
        (
            len(words),
            "both tokenizers have 561 tokens, of which student and teacher have 61 and 561 rows: the loss leaves out 500 ",
        ),
    ):
        caplog.clear()
        tokenizers = {"processing_class": tokenizer(words[:count]), "teacher_processing_class": tokenizer(words)}
        assert KDTrainer(student, settings(tmp_path), teacher=one, **tokenizers).vocab_size == VOCAB
        (record,) = caplog.records
        assert record.message.startswith(said)
        caplog.clear()
        assert KDTrainer(student, settings(tmp_path, vocab_size=VOCAB), teacher=one, **tokenizers).vocab_size == VOCAB
        assert not caplog.records


def test_a_processor_stands_for_its_tokenizer(tmp_path: Path) -> None:
    class Processor(transformers.ProcessorMixin):  # type: ignore[misc]
        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer = tokenizer

        def save_pretrained(self, folder: str, **_: Any) -> None:
            self.tokenizer.save_pretrained(folder)

    words = [f"w{number}" for number in range(VOCAB)]
    student, teacher = models(torch.float32)
    ours = tokenizer(words[:-4])
    ours.eos_token = words[9]
    trainer = KDTrainer(
        student,
        settings(tmp_path, on_policy_fraction=1.0, on_policy_max_new_tokens=4),
        train_dataset=[{"input_ids": [token % 50 for token in one["input_ids"]]} for one in examples()],  # that both know
        teacher=teacher,
        processing_class=Processor(ours),
        teacher_processing_class=Processor(tokenizer(words)),
    )
    assert trainer.vocab_size == VOCAB - 4
    assert trainer.on_policy is not None
    assert 9 in trainer.on_policy.ends
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == ours.get_vocab()


@pytest.mark.parametrize("place", ["processing_class", "teacher_processing_class"])
@pytest.mark.parametrize(
    ("given", "message"),
    [("x", "got the text 'x'"), (3, "got a int"), (transformers.AutoTokenizer, "got the class AutoTokenizer")],
)
def test_what_is_no_tokenizer_is_refused_before_the_teacher_is_loaded(tmp_path: Path, place: str, given: Any, message: str) -> None:
    student, _ = models(torch.float32)
    with pytest.raises(TypeError, match=rf"^{place} is a tokenizer of transformers .*, or a processor that has one .*, {message}$"):
        KDTrainer(student, settings(tmp_path), teacher="no/such/teacher", **{place: given})


def test_a_tokenizer_that_cannot_be_saved_with_the_student_is_refused(tmp_path: Path) -> None:
    student, teacher = models(torch.float32)
    raw = tokenizer([f"w{number}" for number in range(VOCAB)]).backend_tokenizer
    with pytest.raises(TypeError, match=r"^processing_class is saved with the student, and Tokenizer has no save_pretrained; acc"):
        KDTrainer(student, settings(tmp_path), teacher=teacher, processing_class=raw)
    KDTrainer(student, settings(tmp_path), teacher=teacher, teacher_processing_class=raw)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "kl"}, "method 'kl' is not known; accepted: forward_kl, .*, taid, okd"),
        ({"method": "jsd", "divergence": "reverse_kl"}, "divergence='reverse_kl' goes with method 'taid' or 'okd'"),
        ({"method": "forward_kl", "divergence_parameter": 0.3}, "'forward_kl' has no parameter, got 0.3"),
        ({"method": "jsd", "divergence_parameter": 1.0}, "beta=1.0 is outside"),
        ({"temperature": 0.0}, "temperature is a positive number from 1e-9 to 1e5, got 0"),
        ({"kd_weight": -1.0}, "kd_weight is a number of at least 0, got -1"),
        ({"on_policy_fraction": 1.5}, r"on_policy_fraction is a number in \[0, 1\], got 1.5"),
        ({"on_policy_schedule": "adaptive"}, "on_policy_schedule='adaptive' goes by evaluations"),
        ({"on_policy_schedule": "linear"}, "on_policy_schedule 'linear' is not known; accepted: constant, adaptive"),
        ({"okd_teacher_alpha": 2.0}, r"okd_teacher_alpha is a number in \[0, 1\]"),
        ({"method": "taid", "taid_t_start": 0.9, "taid_t_end": 0.5}, "0 <= t_start <= t_end <= 1"),
        ({"strategy": "rows"}, "strategy 'rows' is not known"),
        ({"topk_tail": "drop"}, "topk_tail 'drop' is not known; accepted: "),
        ({"okd_lora_rank": 0}, "okd_lora_rank is a whole number of at least 1, got 0"),
        ({"on_policy_max_new_tokens": 0}, "on_policy_max_new_tokens is a whole number of at least 1"),
        ({"memory_budget": 1.5}, "memory_budget is a whole number of at least 1, got 1.5"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
    ],
)
def test_bad_settings_are_refused_by_name(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        settings(tmp_path, **given)


def test_what_the_trainer_cannot_do_is_refused(tmp_path: Path) -> None:
    student, teacher = models(torch.float32)
    args = settings(tmp_path)
    with pytest.raises(TypeError, match=r"args is a KDConfig, got TrainingArguments"):
        KDTrainer(student, transformers.TrainingArguments(str(tmp_path), use_cpu=True), teacher=teacher)
    with pytest.raises(ValueError, match=r"compute_metrics is not accepted: .* makes no logits"):
        KDTrainer(student, args, teacher=teacher, compute_metrics=len)
    with pytest.raises(ValueError, match=r"one and the same model"):
        KDTrainer(student, args, teacher=student)
    with pytest.raises(TypeError, match=r"teacher is a causal language model, its folder or name, .*, got int"):
        KDTrainer(student, args, teacher=3)
    with pytest.raises(ValueError, match="teacher 'no/such/folder' cannot be loaded"):
        KDTrainer(student, args, teacher="no/such/folder")
    with pytest.raises(ValueError, match="has no parameter that requires a gradient"):
        KDTrainer(models(torch.float32)[0].requires_grad_(False), args, teacher=teacher)
    with pytest.raises(ValueError, match="loss that balances experts, which this loss does not add"):
        KDTrainer(build("qwen3_moe", output_router_logits=True).float(), args, teacher=teacher)
    with pytest.raises(ValueError, match="an example has no input_ids; it has text"):
        KDTrainer(student, args, train_dataset=[{"text": "abc"}] * 4, teacher=teacher).train()
    with pytest.raises(ValueError, match=f"vocab_size=99; accepted: 1 to {VOCAB}"):
        KDTrainer(student, settings(tmp_path, vocab_size=99), teacher=teacher)
