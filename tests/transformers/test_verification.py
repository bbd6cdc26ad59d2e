"""``verify_lm_head`` takes a right model whatever its rounding, and names what a model does after its head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdkernels as kd
from tests.support.hidden import adapted

transformers = pytest.importorskip("transformers")
from kdkernels.transformers import lm_head, verify_lm_head  # noqa: E402  (needs nothing installed, but is of no use)
from tests.support.tiny_models import MODELS, VOCAB, WIDTH, build, model_class  # noqa: E402

# peft on LoRA of a tied head, which is meant here
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


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
