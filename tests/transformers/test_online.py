"""OKD's teacher: that nothing but its LoRA moves, and that its training is one training wherever it runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.online import ADAMW, backward, contents, lively, losses, teach
from tests.support.training import assert_same

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from kdkernels.transformers import hidden_states, lm_head  # noqa: E402  (needs what the lines above look for)
from kdkernels.transformers.online import OnlineTeacher  # noqa: E402
from tests.support.tiny_models import batch, build, labels  # noqa: E402
from tests.transformers.test_online_modules import expected_names  # noqa: E402

# the start


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "deepseek_v3"])
def test_the_teacher_starts_as_the_model_was(family: str, dtype: torch.dtype, dropout: float) -> None:
    model, inputs = build(family).to(dtype), batch()
    expected, hidden = model(**inputs).logits, hidden_states(model, inputs)
    weight = lm_head(model).weight
    teacher = OnlineTeacher(model, rank=3, dropout=dropout)
    assert torch.equal(teacher.model(**inputs).logits, expected)
    assert torch.equal(hidden_states(teacher.model, inputs), hidden)
    assert lm_head(teacher.model).weight is weight
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert not any(parameter.requires_grad for name, parameter in teacher.model.named_parameters() if "lora" not in name)


def test_the_lora_is_repeatable_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (contents(OnlineTeacher(build("llama"), rank=3, seed=seed)) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(first, again)
    for name in first:
        assert torch.equal(first[name], other[name]) == ("lora_B" in name)


@pytest.mark.parametrize(("alpha", "factor"), [(None, 2.0), (3.0, 0.5)])
def test_the_lora_is_scaled_by_alpha_over_rank(alpha: float | None, factor: float) -> None:
    teacher = lively(OnlineTeacher(build("llama").double(), rank=6, alpha=alpha))
    layer = teacher.model.base_model.model.model.layers[1].self_attn.v_proj
    x = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight + factor * update).T)


def test_only_the_loras_dropout_is_on_in_training() -> None:
    model = build("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    teacher, inputs = OnlineTeacher(model, rank=3, dropout=0.5), batch()
    assert torch.equal(teacher.model(**inputs).logits, teacher.model(**inputs).logits)  # B is 0
    lively(teacher)
    assert not torch.equal(teacher.model(**inputs).logits, teacher.model(**inputs).logits)
    teacher.train(False)
    assert torch.equal(teacher.model(**inputs).logits, teacher.model(**inputs).logits)
    teacher.train()
    assert {name.rsplit(".", 1)[-1] for name, m in teacher.model.named_modules() if m.training} == {"default", "lora_dropout"}


# training


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_the_base_stays_as_it_is_while_the_lora_learns(family: str) -> None:
    student, model = build("llama", seed=2), build(family, seed=5)
    base = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = copy.deepcopy(model)
    original = {**dict(before.named_parameters()), **dict(before.named_buffers())}
    teacher = teach(model, learning_rate=3e-2)
    start = contents(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    by_step = []
    for _ in range(20):
        loss = losses(student, teacher)
        (loss.student + loss.teacher).backward()
        by_step.append(float(loss.teacher.detach()))
        assert all(parameter.grad is None for parameter in base.values())
        assert float(teacher.step(1.0, 1.0)) > 0
        assert all(parameter.grad is None for parameter in teacher.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert by_step[-1] < by_step[0]
    for name, tensor in base.items():
        assert torch.equal(tensor, original[name]), name
    for name, parameter in teacher.named_parameters().items():
        assert not torch.equal(parameter, start[name]), name


def test_gradients_of_okd_are_those_of_the_models_own_logits() -> None:
    """The whole way, LoRA included, against softmaxes of the logits in float64."""
    student, teacher = build("llama", seed=2).double(), lively(OnlineTeacher(build("gpt2", seed=5).double(), rank=3))
    losses(student, teacher).teacher.backward()
    found = {name: parameter.grad for name, parameter in teacher.named_parameters().items()}
    for parameter in teacher.parameters():
        parameter.grad = None
    inputs = batch()
    with torch.no_grad():
        log_q = student(**inputs).logits.log_softmax(-1)
    log_p = teacher.model(**inputs).logits.log_softmax(-1)
    targets = labels(inputs)
    kept = targets != -100
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1)[kept].mean()
    (0.5 * divergence + 0.5 * nn.functional.nll_loss(log_p[kept], targets[kept])).backward()
    for name, parameter in teacher.named_parameters().items():
        torch.testing.assert_close(found[name], parameter.grad)


def test_its_own_learning_rate_is_what_moves_it() -> None:
    """SGD: the step is learning_rate × rate × gradient, whatever the student's options say of rate and decay."""
    teacher = lively(OnlineTeacher(build("llama"), rank=3))
    teacher.optimize_with(torch.optim.SGD, {"lr": 9.0, "weight_decay": 9.0}, 0.25)
    before = contents(teacher)
    backward(teacher)
    gradient = {name: parameter.grad.clone() for name, parameter in teacher.named_parameters().items()}
    teacher.step(0.0, None)
    assert_same(contents(teacher), before)
    backward(teacher)
    teacher.step(0.5, None)
    for name, parameter in teacher.named_parameters().items():
        assert torch.equal(parameter, before[name] - 0.125 * gradient[name])


def test_the_learning_rate_is_not_part_of_the_state() -> None:
    slow, fast = (teach(learning_rate=rate) for rate in (1e-4, 1e-2))
    backward(slow)
    slow.step(1.0, None)
    fast.load_state_dict(slow.state_dict())
    before = contents(fast)
    for teacher in (slow, fast):
        backward(teacher)
        teacher.step(1.0, None)
    moved = [torch.cat([(after[name] - before[name]).flatten() for name in before]) for after in map(contents, (slow, fast))]
    torch.testing.assert_close(moved[1].norm() / moved[0].norm(), torch.tensor(100.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("limit", [1e-3, 1e3, None])
def test_clipping_is_by_the_norm_of_all_gradients(limit: float | None) -> None:
    teacher = lively(OnlineTeacher(build("llama").double(), rank=3))
    teacher.optimize_with(torch.optim.SGD, {}, 1.0)
    before = contents(teacher)
    backward(teacher)
    gradient = {name: parameter.grad.clone() for name, parameter in teacher.named_parameters().items()}
    norm = torch.cat([part.flatten() for part in gradient.values()]).square().sum().sqrt()
    torch.testing.assert_close(teacher.step(1.0, limit), norm)
    factor = 1.0 if limit is None else min(1.0, limit / float(norm))
    for name, parameter in teacher.named_parameters().items():
        # torch adds 1e-6 to the norm that it divides by
        torch.testing.assert_close(before[name] - parameter, factor * gradient[name], rtol=1e-6 / float(norm) + 1e-9, atol=1e-12)


def test_a_parameter_that_took_no_part_stays_and_a_step_without_gradients_is_an_error() -> None:
    teacher = lively(teach())
    with pytest.raises(RuntimeError, match="after backward"):
        teacher.step(1.0, None)
    name, first = next(iter(teacher.named_parameters().items()))
    before = contents(teacher)
    backward(teacher)
    first.grad = None
    teacher.step(1.0, 1.0)
    after = contents(teacher)
    assert [key for key in before if torch.equal(before[key], after[key])] == [name]


def test_a_scaled_loss_gives_the_same_step() -> None:
    plain, scaled = (lively(teach()) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # a power of two: scaling is exact
    for seed in range(2):
        backward(plain, seed)
        scaler.scale(torch.ones(()))
        backward(scaled, seed, scaler.get_scale())
        assert torch.equal(scaled.step(1.0, 0.1, scaler), plain.step(1.0, 0.1))
        assert scaler.get_scale() == 1024.0  # the student's update is still to come
        scaler.update()
    assert_same(scaled.state_dict(), plain.state_dict())


def test_a_scaled_loss_that_overflows_is_left_out_and_lowers_the_scale() -> None:
    teacher, scaler = lively(teach()), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = contents(teacher)
    scaler.scale(torch.ones(()))
    backward(teacher, scale=float("inf"))
    assert not torch.isfinite(teacher.step(1.0, 1.0, scaler))
    scaler.update()
    assert_same(contents(teacher), before)
    assert scaler.get_scale() == 512.0
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_checkpointed_layers_run_twice_and_give_the_same_gradients(family: str) -> None:
    """Dropout of the LoRA drops the same again; that of OPT, whose layers have their own, stays off."""
    model = build(family)
    plain, checkpointed = (lively(OnlineTeacher(copy.deepcopy(model), rank=3, dropout=0.3)) for _ in range(2))
    checkpointed.checkpoint_activations()
    checkpointed.checkpoint_activations()
    gradient, runs = {}, {}
    for teacher in (plain, checkpointed):
        calls: list[Any] = []
        name = expected_names(family)[0]
        layer = teacher.model.get_submodule(f"base_model.model.{name}")
        layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(4)
        backward(teacher)
        gradient[teacher] = {name: parameter.grad for name, parameter in teacher.named_parameters().items()}
        runs[teacher] = len(calls)
    assert_same(gradient[checkpointed], gradient[plain])
    assert (runs[plain], runs[checkpointed]) == (1, 2)


# state


@pytest.mark.parametrize("optimizer", [ADAMW, (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.SGD, {})], ids=str)
def test_interrupted_training_is_uninterrupted_training(optimizer: Any, tmp_path: Any) -> None:
    def fresh() -> OnlineTeacher:
        teacher = OnlineTeacher(build("llama", seed=5), rank=3)
        teacher.optimize_with(*optimizer, 1e-2)
        return teacher

    def run(teacher: OnlineTeacher, steps: range) -> None:
        for seed in steps:
            backward(teacher, seed)
            teacher.step(1.0 / (1 + seed), 0.5)

    through, first = fresh(), fresh()
    run(through, range(6))
    run(first, range(3))
    state = first.state_dict()
    run(first, range(3, 4))  # the state is a copy, and does not move on
    torch.save(state, tmp_path / "teacher.pt")
    second = fresh()
    second.load_state_dict(torch.load(tmp_path / "teacher.pt", weights_only=True))
    run(second, range(3, 6))
    assert_same(second.state_dict(), through.state_dict())


def test_a_state_that_is_loaded_is_copied() -> None:
    teacher, other = lively(teach()), teach()
    backward(teacher)
    teacher.step(1.0, 1.0)
    state = teacher.state_dict()
    kept = copy.deepcopy(state)
    other.load_state_dict(state)
    backward(other)
    other.step(1.0, 1.0)
    assert_same(state, kept)


def test_the_state_of_another_lora_is_refused() -> None:
    teacher = teach()
    before = contents(teacher)
    with pytest.raises(ValueError, match=r"q_proj.lora_A.default.weight is \(4, 16\) in it, \(3, 16\) in this teacher"):
        teacher.load_state_dict(teach(rank=4).state_dict())
    with pytest.raises(ValueError, match=r"v_proj.lora_A.default.weight is absent in it, \(3, 16\) in this teacher"):
        teacher.load_state_dict(teach(target_modules=["q_proj"]).state_dict())
    with pytest.raises(RuntimeError, match="state has no optimizer"):
        teacher.load_state_dict(OnlineTeacher(build("llama"), rank=3).state_dict())
    without = OnlineTeacher(build("llama"), rank=3)
    with pytest.raises(RuntimeError, match="call optimize_with"):
        without.load_state_dict(teacher.state_dict())
    assert_same(contents(teacher), before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_saved_adapter_makes_the_same_teacher(family: str, tmp_path: Any) -> None:
    teacher, inputs = lively(OnlineTeacher(build(family, seed=5), rank=3)), batch()
    teacher.save(tmp_path / "adapter")
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):  # of peft 0.21 with transformers 5.23
        loaded = peft.PeftModel.from_pretrained(build(family, seed=5), str(tmp_path / "adapter"))
    assert torch.equal(loaded(**inputs).logits, teacher.model(**inputs).logits)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_unloading_gives_the_model_back_as_it_was(family: str) -> None:
    model, inputs = build(family).train(), batch()
    first = next(model.parameters()).requires_grad_(False)
    model.get_submodule(expected_names(family)[0]).eval()

    def seen() -> dict[str, Any]:
        modules = {name: (module, type(module), module.training, set(vars(module))) for name, module in model.named_modules()}
        return {**modules, **{f"{name} ": (p, p.requires_grad) for name, p in model.named_parameters()}}

    before, values = seen(), copy.deepcopy(model.state_dict())
    teacher = teach(model, dropout=0.5)
    teacher.checkpoint_activations()
    backward(teacher)
    teacher.step(1.0, 1.0)
    assert teacher.unload() is model
    after = seen()
    assert after.keys() == before.keys()
    for name, was in before.items():
        assert all(x is y or x == y for x, y in zip(was, after[name], strict=True)), name
    assert not first.requires_grad
    assert_same(dict(model.state_dict()), dict(values))
    assert torch.equal(model.eval()(**inputs).logits, build(family)(**inputs).logits)
    OnlineTeacher(model, rank=2)  # a second time, without a word of peft's


# what is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank is a whole number of at least 1, got 0"),
        ({"rank": 2.0}, TypeError, "rank is a whole number of at least 1, got float"),
        ({"seed": -1}, ValueError, "seed is a whole number of at least 0, got -1"),
        ({"alpha": 0.0}, ValueError, "alpha is a number above 0, or None, got 0"),
        ({"alpha": "32"}, TypeError, "alpha is a number above 0, or None, got str"),
        ({"dropout": 1.0}, ValueError, r"dropout is a number in \[0, 1\), got 1.0"),
        ({"target_modules": 3}, TypeError, "target_modules is names of modules, .* got 3"),
        ({"target_modules": []}, ValueError, "target_modules is names of modules, .* got none at all"),
        ({"target_modules": ["no_such"]}, ValueError, "no_such"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_and_the_model_is_left_alone(arguments: dict[str, Any], error: Any, message: str) -> None:
    model = build("llama")
    with pytest.raises(error, match=message):
        OnlineTeacher(model, **arguments)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("lora" in name for name, _ in model.named_modules())


def test_models_that_are_wrapped_or_adapted_already_are_refused() -> None:
    with pytest.raises(TypeError, match="got str"):
        OnlineTeacher("a name")
    with pytest.raises(ValueError, match="wrapped in OptimizedModule"):
        OnlineTeacher(torch.compile(build("llama"), backend="eager"))
    teacher = OnlineTeacher(build("llama"), rank=2)
    for model in (teacher.model, teacher.model.get_base_model()):
        with pytest.raises(ValueError, match=r"adapters of peft already.*merge_and_unload"):
            OnlineTeacher(model)


def test_steps_out_of_order_are_refused() -> None:
    teacher = OnlineTeacher(build("llama"), rank=2)
    backward(teacher)
    with pytest.raises(RuntimeError, match="call optimize_with first"):
        teacher.step(1.0, None)
    with pytest.raises(ValueError, match="learning_rate is a number of at least 0, got -1"):
        teacher.optimize_with(*ADAMW, -1.0)
    teacher.optimize_with(*ADAMW, 1.0)
    with pytest.raises(ValueError, match="rate is a number of at least 0, got -1"):
        teacher.step(-1.0, None)
    with pytest.raises(ValueError, match="max_grad_norm is a number above 0, or None, got 0"):
        teacher.step(1.0, 0.0)
    with pytest.raises(RuntimeError, match=r"shard.mesh. comes before optimize_with"):
        teacher.shard(None)


def test_a_model_without_layers_to_checkpoint_is_refused() -> None:
    class Bare(transformers.LlamaForCausalLM):
        pass

    model = build("llama", Bare)
    layers = model.model.layers
    for index, layer in enumerate(layers):
        bare = nn.Module()
        bare.self_attn = layer.self_attn
        layers[index] = bare
    with pytest.raises(ValueError, match="Bare has no layers that transformers can checkpoint"):
        OnlineTeacher(model, rank=2).checkpoint_activations()
