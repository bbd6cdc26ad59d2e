"""Models and batches of which a loss from hidden states makes no sense: each is refused for what it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kdkernels.transformers import KDConfig, KDTrainer, hidden_states, lm_head, verify_lm_head, write_cache
from kdkernels.transformers.data import Collator
from tests.support.tiny_models import VOCAB, build

IDS = torch.arange(3, 13).view(2, 5)
SMALL = {"vocab_size": VOCAB, "d_model": 16, "decoder_start_token_id": 0}


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**SMALL, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def bart() -> Any:
    """Makes decoder_input_ids of input_ids by itself, which its encoder has then seen."""
    half = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
    options = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in half.items()}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**SMALL, **options))


def bert(cls: str = "BertForMaskedLM") -> Any:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return getattr(transformers, cls)(transformers.BertConfig(vocab_size=VOCAB, **size))


def quantised() -> Any:
    with warnings.catch_warnings():  # torch.ao is deprecated, and still what people have
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(build("llama"), {torch.nn.Linear}, dtype=torch.qint8)


SOME = {"input_ids": [4, 5, 6]}


def trainer(folder: Path, student: Any, teacher: Any, examples: Any = (SOME,), train: Any = (SOME,)) -> KDTrainer:
    options = KDConfig(str(folder), report_to=[], use_cpu=True, save_strategy="no", max_steps=2)
    return KDTrainer(student, options, train_dataset=list(train), eval_dataset=list(examples), teacher=teacher)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "t5": (t5, r"{role} \(T5ForConditionalGeneration\) is an encoder-decoder; accepted: a causal language model"),
    "bart": (bart, r"{role} \(BartForConditionalGeneration\) is an encoder-decoder; accepted: a causal language model"),
    "masked": (bert, r"{role} \(BertForMaskedLM\) lets a token see the tokens after it; accepted: a causal language model"),
    "headless": (lambda: bert("BertModel"), r"BertModel has no output head"),
    "meta": (lambda: build("llama").to("meta"), r"{role} \(LlamaForCausalLM\) has weights on the meta device, model.embed_tokens"),
    "quantised head": (quantised, r"torch\.ao\.nn\.quantized\.dynamic.*leave the head out of the quantisation"),
}


@pytest.mark.parametrize("role", ["model", "teacher"])
@pytest.mark.parametrize("name", REFUSED)
def test_the_trainer_says_what_is_wrong_with_a_model(name: str, role: str, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    models = (make(), build("llama")) if role == "model" else (build("llama"), make())
    if name == "quantised head" and role == "model":
        models[0].requires_grad_(True)  # its embeddings are still to be trained
    with pytest.raises(ValueError, match=words.format(role=role)):
        trainer(tmp_path, *models)


def test_a_model_that_drops_out_in_training_is_still_causal(tmp_path: Path) -> None:
    """GPT-NeoX says that it is no decoder, and so is tried out."""
    student = build("gpt_neox", hidden_dropout=0.5).train()
    trainer(tmp_path, student, build("gpt_neox", seed=1))
    assert student.training


@pytest.mark.parametrize("make", [t5, bart])
def test_an_encoder_decoder_takes_its_decoders_tokens_and_no_others(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make().eval()
    verify_lm_head(model)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}
    hidden, head = hidden_states(model, inputs), lm_head(model)
    found = hidden @ head.weight.T if head.bias is None else hidden @ head.weight.T + head.bias
    torch.testing.assert_close(found, model(**inputs).logits, rtol=1e-4, atol=1e-4)
    for call in (lambda: hidden_states(model, IDS), lambda: write_cache(model, [{"input_ids": [4, 5]}], tmp_path / "c", top_k=4)):
        with pytest.raises(ValueError, match="is an encoder-decoder, and batch has no decoder_input_ids; it has input_ids"):
            call()


@pytest.mark.parametrize("read", [lm_head, verify_lm_head, lambda model: hidden_states(model, IDS)])
def test_a_quantised_head_is_told_from_the_linear_that_it_is_named_after(read: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"torch\.ao\.nn\.quantized\.dynamic\S*Linear \(quantised: leave the head out"):
        read(quantised())


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_a_batch_without_tokens_is_named(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"batch has no tokens: its input_ids have shape \(\d, \d\)"):
        hidden_states(build("llama"), torch.zeros(shape, dtype=torch.int64))


EMPTY = {"input_ids": [], "labels": []}


def test_examples_without_tokens_are_padding() -> None:
    batch = Collator(7)([EMPTY, EMPTY])
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[7], [7]],
        "attention_mask": [[0], [0]],
        "labels": [[-100], [-100]],
    }


@pytest.mark.parametrize("others", [[], [SOME]], ids=["alone", "beside others"])
def test_examples_without_tokens_teach_nothing(others: list[dict[str, Any]], tmp_path: Path) -> None:
    models, examples = (build("llama"), build("llama", seed=1)), [EMPTY, *others, EMPTY]
    with_them = trainer(tmp_path, *models, examples).evaluate()["eval_loss"]
    assert with_them == (trainer(tmp_path, *models, others).evaluate()["eval_loss"] if others else 0.0)
    if not others:
        with pytest.raises(ValueError, match="train_dataset has 2 examples and not one token to learn"):
            trainer(tmp_path, *models, examples, examples)
        return
    before = [parameter.detach().clone() for parameter in models[0].parameters()]
    trainer(tmp_path, *models, examples, examples).train()
    assert all(parameter.isfinite().all() for parameter in models[0].parameters())
    assert not all(torch.equal(*pair) for pair in zip(before, models[0].parameters(), strict=True))


def test_a_cache_of_examples_without_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"examples\[1\] has no tokens; accepted: at least one"):
        write_cache(build("llama"), [{"input_ids": [4, 5]}, EMPTY], tmp_path / "cache", top_k=4)
