"""Hidden states and heads of real models, tiny and made from their configurations: nothing is downloaded."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdkernels as kd
from benchmarks.readme import README
from tests.support import oracle
from tests.support.cases import InsideOperators, root_mean_square
from tests.support.oracle import Options

transformers = pytest.importorskip("transformers")

from kdkernels.transformers import hidden_states, lm_head, verify_lm_head  # noqa: E402  (needs nothing installed, but is of no use)
from tests.support.tiny_models import HEADS, MODELS, TOKENS, VOCAB, WIDTH, batch, build, config, labels, model_class  # noqa: E402

# peft 0.21 and transformers 5.23 together; and peft on LoRA of a tied head, which is meant here
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


def logits_by(head: kd.LMHead, hidden: Tensor) -> Tensor:
    return oracle.after_head(hidden, head.weight, head.bias, head.logit_scale, head.softcap)


def as_close(found: Tensor, eager: Tensor, exact: Tensor, scale: Tensor | None = None) -> None:
    """The error is at most four times that of the eager computation, and four roundings of a typical value."""
    typical = exact if scale is None else scale
    allowed = 4 * root_mean_square([eager - exact]) + 4 * torch.finfo(found.dtype).eps * root_mean_square([typical])
    assert root_mean_square([found.double() - exact]) <= allowed


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter that has one; those without are not in it."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    named = [(name.removeprefix("_orig_mod."), p) for name, p in model.named_parameters()]
    found = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


TEACHER = torch.randn(*TOKENS, VOCAB, generator=torch.Generator().manual_seed(9)).double() * 3
OPTIONS = Options(divergence="reverse_kl", temperature=1.5, ce_weight=0.3)


def eager_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """From the model's own logits, in its dtype."""
    x, targets = model(**inputs, use_cache=False).logits, labels(inputs)
    return oracle.mean(oracle.losses(x, TEACHER.to(x.dtype), targets, None, OPTIONS), targets, None, OPTIONS)


def fused_loss(model: Any, inputs: dict[str, Tensor]) -> Any:
    """The same from hidden states and head. The teacher's logits are its hidden states, times one."""
    hidden = hidden_states(model, inputs)
    teacher = (TEACHER.to(hidden.dtype), torch.eye(VOCAB, dtype=hidden.dtype))
    options = {"divergence": "reverse_kl", "temperature": 1.5, "ce_weight": 0.3}
    return kd.linear_kd_loss(hidden, lm_head(model), *teacher, labels(inputs), **options)


def assert_same_training(model: Any, plain: Any = None, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Loss and all gradients of the library are those of the model's own logits. plain: the model to get them from."""
    inputs = batch() if inputs is None else inputs
    plain = model if plain is None else plain
    twin = copy.deepcopy(plain).double()
    exact_loss, eager, loss = eager_loss(twin, inputs), eager_loss(plain, inputs), fused_loss(model, inputs)
    as_close(loss.detach(), eager.detach(), exact_loss.detach())
    exact, by_logits, found = gradients(twin, exact_loss), gradients(plain, eager), gradients(model, loss)
    assert found.keys() == exact.keys()
    everything = torch.cat([gradient.flatten() for gradient in exact.values()])
    for name in exact:
        as_close(found[name], by_logits[name], exact[name], everything)
    return found


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("llama")


@pytest.mark.parametrize("name", MODELS)
def test_head_of_hidden_states_is_the_models_logits(name: str) -> None:
    model, inputs = build(name), batch()
    exact = copy.deepcopy(model).double()(**inputs).logits
    head, hidden = lm_head(model), hidden_states(model, inputs)
    as_close(logits_by(head, hidden), model(**inputs).logits, exact)
    expected = {"logit_scale": 1.0, "softcap": None, **HEADS.get(name, {})}
    assert (head.logit_scale, head.softcap) == (expected["logit_scale"], expected["softcap"])
    assert head.weight is model.get_output_embeddings().weight
    assert head.bias is getattr(model.get_output_embeddings(), "bias", None)
    assert (head.bias is not None) == (name in ("phi", "gptj", "modernbert_decoder"))
    assert vars(model.get_output_embeddings()).get("forward") is None


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_models_own_logits(name: str) -> None:
    model = build(name)
    found = assert_same_training(model)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", MODELS)
def test_verification_passes(name: str) -> None:
    verify_lm_head(build(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "phi", "cohere"])
def test_verification_passes_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    verify_lm_head(build(name).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_verification_passes_where_tokens_have_weights_of_very_different_size(name: str, dtype: torch.dtype) -> None:
    """As in a trained model: the rounding of a token's logit is as large as its row of the head."""
    model = build(name, vocab_size=3000, hidden_size=64)
    with torch.no_grad():
        model.get_output_embeddings().weight[7::500] *= 200.0
    verify_lm_head(model.to(dtype))


def test_verification_passes_under_autocast(llama: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        verify_lm_head(llama)


class LargestMade(InsideOperators):
    """The most entries of a tensor made, and of one as wide as the vocabulary."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.entries, self.of_logits = vocab, 0, 0

    def after(self, name: str, made: Any) -> None:
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
                if tensor.dim() > 2 and tensor.shape[-1] == self.vocab:
                    self.of_logits = max(self.of_logits, tensor.numel())


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite", "phi", "gpt2", "minicpm3"])
def test_hidden_states_make_no_logits(name: str) -> None:
    vocab = 509  # more than anything else in the model is wide
    model, inputs = build(name, vocab_size=vocab), batch(tokens=(2, 31), vocab=vocab)
    logits = inputs["input_ids"].numel() * vocab
    with LargestMade(vocab) as made:
        model(**inputs)
    assert made.of_logits == logits, "the count does not see the logits"
    with LargestMade(vocab) as made:
        hidden_states(model, {**inputs, "labels": inputs["input_ids"]})
    assert made.of_logits == 0
    assert made.entries < logits


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_autocast_casts_no_head_for_hidden_states(name: str) -> None:
    vocab, inputs = 509, batch(vocab=509)
    model = build(name, vocab_size=vocab)
    casts: list[Any] = []

    class Casts(InsideOperators):
        def after(self, name: str, made: Any) -> None:
            if name == "aten::_to_copy" and made.shape == (vocab, WIDTH):
                casts.append(made.dtype)

    with torch.autocast("cpu", torch.bfloat16), Casts():
        hidden = hidden_states(model, inputs)
        assert not casts
        expected = model(**inputs).logits
        assert casts == [torch.bfloat16]
    with torch.autocast("cpu", torch.bfloat16):
        found = logits_by(lm_head(model), hidden)
    torch.testing.assert_close(found, expected, atol=2e-2 * expected.abs().max().item(), rtol=2e-2)


def test_a_head_that_accelerate_has_hooked() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = build("llama")
    expected = hidden_states(model, batch())
    hooks.add_hook_to_module(model.lm_head, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    forward = vars(model.lm_head)["forward"]
    assert torch.equal(hidden_states(model, batch()), expected)
    assert vars(model.lm_head)["forward"] is forward
    with torch.autocast("cpu", torch.bfloat16):
        hidden_states(model, batch())
    verify_lm_head(model)


def test_weights_that_are_not_here_are_refused() -> None:
    with torch.device("meta"):
        model = model_class("llama")(config("llama"))
    with pytest.raises(ValueError, match="meta device"):
        lm_head(model)
    model = build("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised .torch.float8_e4m3fn"):
        lm_head(model)
    model.lm_head.weight = nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match=r"shape .5,., a shard"):
        lm_head(model)


def test_labels_are_not_given_to_the_model(llama: Any) -> None:
    inputs = batch()
    more = {**inputs, "labels": inputs["input_ids"], "num_items_in_batch": 3}
    assert torch.equal(hidden_states(llama, more), hidden_states(llama, inputs))
    assert "labels" in more
    alone = {"input_ids": inputs["input_ids"]}
    assert torch.equal(hidden_states(llama, inputs["input_ids"]), hidden_states(llama, alone))


def test_positions_are_chosen_as_for_logits(llama: Any) -> None:
    inputs = batch()
    every = hidden_states(llama, inputs)
    assert torch.equal(hidden_states(llama, {**inputs, "logits_to_keep": 3}), every[:, -3:])
    keep = torch.tensor([0, 4])
    assert torch.equal(hidden_states(llama, {**inputs, "logits_to_keep": keep}), every[:, keep])


def test_a_cache_is_only_kept_when_asked_for(llama: Any) -> None:
    caches = []
    handle = llama.model.register_forward_hook(lambda _, __, output: caches.append(output.past_key_values))
    hidden_states(llama, batch())
    hidden_states(llama, {**batch(), "use_cache": True})
    handle.remove()
    assert caches[0] is None
    assert caches[1] is not None


def test_gradient_checkpointing() -> None:
    model = build("llama").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_training(model)


def test_what_a_forward_raises_leaves_the_model_as_it_was(llama: Any) -> None:
    before = {name: dict(vars(module)) for name, module in llama.named_modules()}
    inputs = batch()
    expected = llama(**inputs).logits

    def fail(*_: Any) -> None:
        raise KeyError("in the forward")

    for module in (llama.model.layers[1], llama.lm_head):
        handle = module.register_forward_hook(fail)
        with pytest.raises(KeyError, match="in the forward"):
            hidden_states(llama, inputs)
        handle.remove()
    assert {name: dict(vars(module)) for name, module in llama.named_modules()} == before
    assert torch.equal(llama(**inputs).logits, expected)


def test_a_call_within_a_call_gets_its_own(llama: Any) -> None:
    inputs, inner = batch(), []

    def call(*_: Any) -> None:
        handle.remove()
        inner.append(hidden_states(llama, batch(2)))

    handle = llama.model.register_forward_hook(call)
    outer = hidden_states(llama, inputs)
    assert torch.equal(outer, hidden_states(llama, inputs))
    assert torch.equal(inner[0], hidden_states(llama, batch(2)))


def test_hooks_of_the_head_run(llama: Any) -> None:
    handle = llama.lm_head.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    doubled = hidden_states(llama, batch())
    handle.remove()
    assert torch.equal(doubled, 2 * hidden_states(llama, batch()))


def test_a_forward_that_does_not_call_its_head_is_refused() -> None:
    class Fused(transformers.LlamaForCausalLM):  # type: ignore[name-defined,misc]
        def forward(self, **inputs: Any) -> Any:
            return self.model(**inputs)

    with pytest.raises(RuntimeError, match=r"called its output head .Linear. 0 times"):
        hidden_states(build("llama", Fused), batch())
    with pytest.raises(ValueError, match="did not call its output head"):
        verify_lm_head(build("llama", Fused))


# wrappers


def run_apart(code: str, *arguments: list[str]) -> None:
    """In processes of their own, one for each list of arguments."""
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [subprocess.Popen([sys.executable, "-c", code, *given], env=found) for given in arguments or [[]]]
    try:
        assert [process.wait(timeout=300) for process in started] == [0] * len(started)
    finally:
        for process in started:
            process.kill()


def test_compiled_models_are_compiled_once_for_hidden_states_and_once_for_logits() -> None:
    model, inputs = build("llama"), batch()
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    expected = hidden_states(model, inputs)
    with torch.no_grad():
        for _ in range(3):
            assert compiled(**inputs, use_cache=False).logits.shape[-2:] == (TOKENS[1], VOCAB)
            assert torch.equal(hidden_states(compiled, inputs), expected)
    assert len(graphs) == 2
    verify_lm_head(compiled)
    assert len(graphs) == 2
    assert lm_head(compiled).weight is model.lm_head.weight


def test_gradients_through_a_compiled_model() -> None:
    torch.compiler.reset()
    model = build("gemma2")
    assert_same_training(torch.compile(model, backend="aot_eager"), model)


DISTRIBUTED = """
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from kdkernels.transformers.heads import unwrapped
from tests.transformers.test_heads import *

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)


def check(kind, model, wrapped):
    if kind == "fsdp":
        for layer in unwrapped(wrapped).model.layers:
            fully_shard(layer)
        fully_shard(wrapped)
    else:
        wrapped = DistributedDataParallel(wrapped, find_unused_parameters=kind == "find unused")
    each = [gradients(model, fused_loss(model, batch(seed))) for seed in (0, 1)]
    for _ in range(2):  # DDP refuses the second step where the first left a parameter unreduced
        found = gradients(wrapped, fused_loss(wrapped, batch(rank)))
        assert [name.removeprefix("module.") for name in found] == list(each[0])
        for gradient, *both in zip(found.values(), *(gradients.values() for gradients in each)):
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            torch.testing.assert_close(gradient, sum(both) / 2)
    verify_lm_head(wrapped)


for kind in ("ddp", "find unused", "fsdp"):
    for name in ("phi", "llama_tied"):
        check(kind, build(name), build(name))
    check(kind, *(adapted(build("llama"), target_modules=["q_proj", "lm_head"]) for _ in range(2)))
dist.destroy_process_group()
"""


def test_gradients_under_ddp_and_fsdp_are_the_mean_over_processes(tmp_path: Any) -> None:
    run_apart(DISTRIBUTED, *([str(rank), str(tmp_path / "store")] for rank in (0, 1)))


def test_data_parallel_is_refused(llama: Any) -> None:
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        hidden_states(nn.DataParallel(llama), batch())


# adapters


def adapted(model: Any, *, seed: int = 3, **options: Any) -> Any:
    """With LoRA whose B is not zero, as it is at first."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", **options}))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("gemma2", {"target_modules": ["lm_head"], "use_rslora": True}),
        ("granite", {"target_modules": ["lm_head"]}),
        ("phi", {"target_modules": ["lm_head"], "lora_bias": True}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ],
    ids=str,
)
def test_lora(name: str, options: dict[str, Any]) -> None:
    model = adapted(build(name), **options)
    found = assert_same_training(model)
    trained = {"lora_A", "lora_B", "modules_to_save"}
    assert all(any(part in key for part in trained) for key in found)  # the frozen base gets no gradient
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    verify_lm_head(model)


def test_lora_on_the_head_is_more_columns_of_it() -> None:
    model = adapted(build("llama"), target_modules=["lm_head"])
    base = model.get_base_model().lm_head.base_layer
    head, hidden = lm_head(model), hidden_states(model, batch())
    assert head.weight.shape == (VOCAB, WIDTH + 3)
    assert torch.equal(head.weight[:, :WIDTH], base.weight)
    assert hidden.shape == (*TOKENS, WIDTH + 3)
    with model.disable_adapter():
        assert lm_head(model).weight is base.weight
        assert torch.equal(hidden_states(model, batch()), hidden[..., :WIDTH])


def test_two_lora_on_the_head_at_once() -> None:
    peft = pytest.importorskip("peft")
    model = adapted(build("llama"), target_modules=["lm_head"])
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=1, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert lm_head(model).weight.shape == (VOCAB, WIDTH + 5)
    assert_same_training(model)
    verify_lm_head(model)


def test_a_merged_lora_is_in_the_weight() -> None:
    model = adapted(build("llama"), target_modules=["lm_head"])
    model.merge_adapter()
    assert lm_head(model).weight.shape == (VOCAB, WIDTH)
    verify_lm_head(model)


def test_dropout_before_a_lora_on_the_head_drops_as_in_the_model() -> None:
    model, inputs = adapted(build("llama"), target_modules=["lm_head"], lora_dropout=0.5).train(), batch()
    torch.manual_seed(5)
    expected = model(**inputs).logits
    torch.manual_seed(5)
    found = logits_by(lm_head(model), hidden_states(model, inputs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{"use_dora": True}], ids=str)
def test_adapters_that_are_not_an_update_by_b_a_are_refused(options: dict[str, Any]) -> None:
    model = adapted(build("llama"), target_modules=["lm_head"], **options)
    for call in (lambda: lm_head(model), lambda: hidden_states(model, batch()), lambda: verify_lm_head(model)):
        with pytest.raises(ValueError, match="adapter 'default' is DoraLinearVariant"):
            call()


def test_other_adapters_on_the_head_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoHaConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="LoRA"):
        lm_head(model)


def test_ddp_and_lora_and_compile_are_seen_through() -> None:
    model = adapted(build("llama"), target_modules=["q_proj"])
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert lm_head(compiled).weight is model.get_base_model().lm_head.weight
    assert torch.equal(hidden_states(compiled, batch()), hidden_states(model, batch()))


# what a head may not be


def test_a_scale_of_unknown_use_is_refused() -> None:
    model = build("llama")
    model.config.logits_scaling = 2.0
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .llama. has logits_scaling = 2"):
        lm_head(model)
    model.config.logits_scaling = 1.0
    lm_head(model)


def test_heads_that_are_not_linear_are_refused() -> None:
    class Normalised(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return nn.functional.linear(hidden, nn.functional.normalize(self.weight))

    model = build("llama")
    model.lm_head = Normalised(WIDTH, VOCAB, bias=False)
    with pytest.raises(ValueError, match="Normalised"):
        lm_head(model)
    model.lm_head = nn.Sequential(nn.Linear(WIDTH, VOCAB))
    with pytest.raises(ValueError, match="Sequential"):
        lm_head(model)
    with pytest.raises(ValueError, match="has no output head"):
        lm_head(model.model)
    with pytest.raises(TypeError, match="got str"):
        lm_head("llama")
    with pytest.raises(TypeError, match="got list"):
        hidden_states(build("llama"), [1, 2])


# verification


def doctored(name: str, change: Any) -> Any:
    """A model whose logits are changed after all that its source does."""

    class Doctored(model_class(name)):  # type: ignore[valid-type,misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = change(output.logits)
            return output

    return build(name, Doctored)


SHIFT = torch.linspace(-1, 1, VOCAB)
ORDER = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "change", "cause"),
    [
        ("llama", lambda x: x * 1.5, "logit scale: the model multiplies the head's output by 1.5"),
        ("granite", lambda x: x * 3, "logit scale: the model multiplies the head's output by 1; .* logit_scale=0.333"),
        ("llama", lambda x: x + SHIFT.to(x.dtype), "a bias: the model adds a constant to each vocabulary entry .largest (1|0.9)"),
        ("llama", lambda x: 30 * torch.tanh(x / 30), "a softcap: .* c = (30|29.9).* a = (1|0.99).*, softcap none"),
        ("cohere", lambda x: 30 * torch.tanh(x / 30), "a softcap: .* c = (30|29.9).* a = 0.2.* softcap none"),
        ("llama", lambda x: x[..., ORDER], "another order: the model permutes"),
        ("llama", lambda x: x.sin(), "unknown"),
    ],
    ids=["scale", "no scale", "bias", "softcap", "scale and softcap", "order", "sine"],
)
def test_verification_names_what_the_model_does_after_its_head(name: str, change: Any, cause: str, dtype: torch.dtype) -> None:
    model = doctored(name, change).to(dtype)
    with pytest.raises(ValueError, match=f"what comes after the head differs: .*{cause}"):
        verify_lm_head(model)


def test_verification_sees_a_softcap_that_the_logits_do_not_reach_yet() -> None:
    model = doctored("llama", lambda x: 30 * torch.tanh(x / 30)).bfloat16()
    with torch.no_grad():
        model.lm_head.weight *= 1e-3
    with pytest.raises(ValueError, match="a softcap"):
        verify_lm_head(model)


def test_verification_of_a_softcap_that_is_not_there() -> None:
    model = build("gemma2")
    head = lm_head(model)
    model.config.final_logit_softcapping = None
    with pytest.raises(ValueError, match="no softcap"):
        verify_lm_head(model, head)
    model.config.final_logit_softcapping = 7.0
    with pytest.raises(ValueError, match=r"a softcap: .* c = 7.* softcap 5"):
        verify_lm_head(model, head)


def test_padded_rows_may_be_cut_off_by_the_model() -> None:
    verify_lm_head(doctored("gemma2", lambda x: x[..., : VOCAB - 5]))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda w, e: (w * 2, None), "a scale: .* by 0.5"),
        (lambda w, e: (w, SHIFT), "a bias"),
        (lambda w, e: (w[ORDER], None), "another order: the rows of the weight are permuted"),
        (lambda w, e: (e, None), "tied weights: the weight given is that of the input embeddings"),
        (lambda w, e: (w + e[:, :1] * w[:1], None), "a low-rank update .rank 1."),
        (lambda w, e: (w + e, None), "unknown: another weight"),
        (lambda w, e: (w[:-1], None), "another height"),
    ],
    ids=["scale", "bias", "order", "tied", "low rank", "weight", "height"],
)
def test_verification_names_how_a_head_given_by_hand_is_wrong(llama: Any, change: Any, cause: str) -> None:
    weight, bias = change(llama.lm_head.weight.detach(), llama.get_input_embeddings().weight.detach())
    with pytest.raises(ValueError, match=f"the head differs: {cause}"):
        verify_lm_head(llama, kd.LMHead(weight, bias))


LORA = {"target_modules": ["lm_head"]}
KINDS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "tied": ("llama_tied", None),
    "bias": ("phi", None),
    "scale": ("granite", None),
    "softcap": ("gemma2", None),
    "lora": ("llama", LORA),
    "lora and scale": ("granite", {**LORA, "r": 8, "lora_alpha": 64}),
    "lora, tied": ("llama_tied", LORA),
    "rslora and softcap": ("gemma2", {**LORA, "use_rslora": True}),
    "lora with bias": ("phi", {**LORA, "lora_bias": True}),
}


def model_of(kind: str, dtype: torch.dtype, seed: int) -> Any:
    name, lora = KINDS[kind]
    model = build(name, seed=seed)
    return (model if lora is None else adapted(model, seed=seed, **lora)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_verification_takes_a_right_model_whatever_its_rounding(kind: str, dtype: torch.dtype) -> None:
    """In float64 too, where what it is held against rounds as much as the model does."""
    for seed in range(8):
        verify_lm_head(model_of(kind, dtype, seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_verification_refuses_what_is_wrong_by_some_roundings(kind: str, dtype: torch.dtype) -> None:
    """64 of them; in bfloat16, whose one rounding is 0.8 %, by 8."""
    wrong = (8 if dtype == torch.bfloat16 else 64) * torch.finfo(dtype).eps
    for seed in range(8):
        model = model_of(kind, dtype, seed)
        head = lm_head(model)
        scaled = {"logit_scale": head.logit_scale, "softcap": head.softcap}
        with torch.no_grad():
            heavier = kd.LMHead(head.weight * (1 + wrong), head.bias, **scaled)
            one_row = head.weight.clone()
            one_row[5] *= 1 + 8 * wrong
        with pytest.raises(ValueError, match="the head differs"):
            verify_lm_head(model, heavier)
        with pytest.raises(ValueError, match="the head differs"):
            verify_lm_head(model, kd.LMHead(one_row, head.bias, **scaled))
        scaled["logit_scale"] *= 1 + 2 * wrong
        with pytest.raises(ValueError, match="what comes after the head differs"):
            verify_lm_head(model, kd.LMHead(head.weight, head.bias, **scaled))


def test_verification_names_input_embeddings_in_place_of_the_head() -> None:
    model = build("llama_tied")
    weight = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="tied weights: the head multiplies by the input embeddings"):
        verify_lm_head(model, kd.LMHead(weight))


def test_verification_names_a_head_that_does_more_than_multiply() -> None:
    class Scaled(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden / 4)

    class Capped(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * torch.tanh(super().forward(hidden) / 2)

    model = build("llama")
    for head, cause in ((Scaled, r"a scale: .* hidden states inside it, by 0.25"), (Capped, "a softcap: the head itself caps")):
        weight = model.lm_head.weight
        model.lm_head = head(WIDTH, VOCAB, bias=False)
        model.lm_head.weight = weight
        with pytest.raises(ValueError, match=cause):
            verify_lm_head(model)


def test_verification_takes_the_width_of_a_lora_on_the_head() -> None:
    model = adapted(build("llama"), target_modules=["lm_head"])
    with pytest.raises(ValueError, match=f"D = {WIDTH}, hidden states that enter the model's have {WIDTH + 3}"):
        verify_lm_head(model, kd.LMHead(model.get_base_model().lm_head.base_layer.weight))


def test_verification_sees_hidden_states_that_are_not_the_same_twice() -> None:
    model = build("llama")
    steps = []
    model.model.norm.register_forward_hook(lambda _, __, output: steps.append(1) or output * len(steps))
    with pytest.raises(ValueError, match="the whole differs: unknown: two forwards"):
        verify_lm_head(model)


@pytest.mark.parametrize("right", [True, False])
def test_verification_changes_nothing(right: bool) -> None:
    model = build("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()  # modes are each module's own

    def run(module: Any, *_: Any) -> None:
        torch.rand(3)
        module.max_seq_len_cached += 1  # as RoPE does that depends on the length
        module.original_inv_freq.add_(1)
        module.new = True
        module.register_buffer("inv_freq", module.inv_freq.clone(), persistent=False)

    model.model.rotary_emb.register_forward_hook(run)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    grad, random = model.lm_head.weight.grad, torch.get_rng_state()
    before = {name: {**vars(module), **module._buffers} for name, module in model.named_modules()}
    content = {name: value.clone() for name, value in (*model.named_buffers(), *model.named_parameters())}
    head = lm_head(model) if right else kd.LMHead(lm_head(model).weight, softcap=1.0)
    if right:
        verify_lm_head(model, head)
    else:
        with pytest.raises(ValueError, match="no softcap"):
            verify_lm_head(model, head)
    assert {name: {**vars(module), **module._buffers} for name, module in model.named_modules()} == before
    assert all(torch.equal(value, content[name]) for name, value in (*model.named_buffers(), *model.named_parameters()))
    assert model.lm_head.weight.grad is grad
    assert torch.equal(grad, torch.ones_like(grad))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_the_library_does_not_import_transformers() -> None:
    code = "import sys, kdkernels; assert not {'transformers', 'peft', 'kdkernels.transformers'} & sys.modules.keys()"
    run_apart(code)


def test_the_readme_counts_the_families() -> None:
    assert (
        " ".join(README.read_text().split()).count(f"go through {len({family for family, _ in MODELS.values()})} model families")
        == 1
    )


def test_the_step_that_the_readme_shows_is_that_of_the_models_own_logits() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "hidden_states(student, batch)" in block)
    student, teacher = build("gemma2"), build("llama", seed=1)
    inputs = batch()
    scope = {"student": student, "teacher": teacher, "batch": {**inputs, "labels": inputs["input_ids"]}}
    exec(block, scope)
    targets = labels(inputs)
    x, z = student(**inputs, use_cache=False).logits, teacher(**inputs, use_cache=False).logits
    expected = oracle.mean(oracle.losses(x, z, targets, None, Options()), targets, None, Options())
    torch.testing.assert_close(scope["loss"], expected)
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
