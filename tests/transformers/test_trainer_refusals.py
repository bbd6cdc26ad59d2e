"""What the trainer refuses, and by which name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from kdkernels.transformers import KDTrainer
from tests.support.tiny_models import VOCAB, build
from tests.support.training import examples, models, settings, trainer, word_tokenizer


def test_the_heads_are_verified_before_anything_else(tmp_path: Path) -> None:
    class Scaled(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *arguments: Any, **options: Any) -> Any:
            out = super().forward(*arguments, **options)
            out.logits = out.logits * 0.5
            return out

    odd, plain = build("llama", Scaled).float(), build("llama", seed=1).float()
    for student, teacher in ((odd, plain), (plain, odd)):
        with pytest.raises(ValueError, match=r"another logit scale: the model multiplies the head's output by 0.5"):
            trainer(tmp_path, student, teacher)


def test_data_without_a_token_to_learn_is_refused_and_held_out_data_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nothing = [
        {"input_ids": [3, 4, 5], "labels": [-100] * 3},
        {"input_ids": [3, 4], "labels": [3, -100]},  # the first is never predicted
        {"input_ids": [0, 3], "attention_mask": [0, 1], "labels": [-100, 3]},
    ]
    with pytest.raises(ValueError, match="train_dataset has no examples; accepted: at least one"):
        trainer(tmp_path, train_dataset=[])
    with pytest.raises(ValueError, match="train_dataset has 3 examples and not one token to learn"):
        trainer(tmp_path, train_dataset=nothing)
    trainer(tmp_path, train_dataset=[*nothing, *examples()], eval_dataset={"a": nothing})
    assert "eval_dataset['a'] has 3 examples and not one token to learn" in caplog.text


@pytest.mark.parametrize("place", ["processing_class", "teacher_processing_class"])
@pytest.mark.parametrize(
    ("given", "message"),
    [("x", "got the text 'x'"), (3, "got a int"), (transformers.AutoTokenizer, "got the class AutoTokenizer")],
)
def test_what_is_no_tokenizer_is_refused_before_the_teacher_is_loaded(tmp_path: Path, place: str, given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=rf"^{place} is a tokenizer of transformers .*, or a processor that has one .*, {message}$"):
        trainer(tmp_path, teacher="no/such/teacher", **{place: given})


def test_a_tokenizer_that_cannot_be_saved_with_the_student_is_refused(tmp_path: Path) -> None:
    raw = word_tokenizer().backend_tokenizer
    with pytest.raises(TypeError, match=r"^processing_class is saved with the student, and Tokenizer has no save_pretrained; acc"):
        trainer(tmp_path, processing_class=raw)
    trainer(tmp_path, teacher_processing_class=raw)


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
