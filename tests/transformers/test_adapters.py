"""LoRA and other adapters, on the head and around it: what is read, what is added to the head, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.hidden import adapted, assert_same_training, logits_by

transformers = pytest.importorskip("transformers")
from kdkernels.transformers import hidden_states, lm_head, verify_lm_head  # noqa: E402  (needs nothing installed, but is of no use)
from tests.support.tiny_models import TOKENS, VOCAB, WIDTH, batch, build  # noqa: E402

# peft on LoRA of a tied head, which is meant here
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


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
