"""What a batch holds: that masks, documents, positions and columns mean the same live, against a cache and to both models, and that
what a model cannot read is refused. Each value is held against examples given one by one, without padding, in plain PyTorch."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdkernels.transformers.data import Collator
from tests.support.batches import APART, RESTARTING, TOGETHER, A, B, both_ways, gpt2, llama, loss, one_by_one, trainer

transformers = pytest.importorskip("transformers")
from kdkernels.transformers import KDConfig, KDTrainer, TopKCache, hidden_states, lm_head, write_cache  # noqa: E402
from kdkernels.transformers.batches.inputs import Inputs  # noqa: E402
from kdkernels.transformers.batches.layout import document_numbers, documents, laid_out, next_tokens, positions_of  # noqa: E402
from kdkernels.transformers.batches.reading import most_positions, takes  # noqa: E402
from kdkernels.transformers.verify import mixes_documents  # noqa: E402
from tests.support.tiny_models import MODELS, VOCAB, build  # noqa: E402

# ---- masks and labels ----

PADDED = {
    "right": {"input_ids": [*A, 0, 0, 0, 0], "attention_mask": [1] * 4 + [0] * 4, "labels": [*A, 0, 0, 0, 0]},
    "left": {"input_ids": [0, 0, *A], "attention_mask": [0, 0, 1, 1, 1, 1], "labels": [0, 0, *A]},
    "both": {"input_ids": [0, *A, 0, 0], "attention_mask": [0, 1, 1, 1, 1, 0, 0], "labels": [3, *A, 3, 3]},
}


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("side", PADDED)
def test_labels_at_padding_count_on_no_path_and_padding_moves_no_position(side: str, make: Any, tmp_path: Path) -> None:
    student, teacher = make(1), make(2)
    right = one_by_one(student, teacher, [A])
    assert both_ways(student, teacher, [PADDED[side]], tmp_path) == pytest.approx((right, right), rel=1e-5)
    if make is llama:
        assert right == pytest.approx(1.6077, abs=5e-5)


def test_a_step_divides_by_the_tokens_that_count(tmp_path: Path) -> None:
    student, teacher = llama(1), llama(2)
    right = one_by_one(student, teacher, [A, B])
    data = [PADDED["left"], {"input_ids": B, "labels": B}]
    training = trainer(student, teacher, data, tmp_path)
    training.train()
    assert next(entry for entry in training.state.log_history if "loss" in entry)["loss"] == pytest.approx(right, rel=1e-5)


def test_padding_of_a_collator_of_ones_own_counts_as_little(tmp_path: Path) -> None:
    """Its labels stand under the padding too, and its padding is no token of either model."""

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        made = Collator(None)(examples)
        return {**made, "input_ids": made["input_ids"].where(made["attention_mask"] == 1, 999), "labels": made["input_ids"]}

    student, teacher = llama(1), llama(2)
    right = one_by_one(student, teacher, [A, B])
    assert both_ways(student, teacher, APART, tmp_path, collator=collate) == pytest.approx((right, right), rel=1e-5)


@pytest.mark.parametrize("added", [False, True])
def test_a_mask_of_pairs_says_what_is_real_and_where_documents_begin(added: bool, tmp_path: Path) -> None:
    student, teacher = llama(1), llama(2)
    allowed = torch.block_diag(torch.ones(4, 4), torch.ones(5, 5), torch.zeros(2, 2)).tril().bool()
    allowed[9:, 0] = True  # a token that may look nowhere would have no attention
    mask = torch.zeros(11, 11).masked_fill(~allowed, torch.finfo(torch.float32).min) if added else allowed

    def collate(_: Any) -> dict[str, Tensor]:
        ids = torch.tensor([[*A, *B, 0, 0]])
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0]])
        return {"input_ids": ids, "labels": ids, "position_ids": positions, "attention_mask": mask[None, None]}

    found = loss(student, teacher, APART, tmp_path, collator=collate)
    assert found == pytest.approx(one_by_one(student, teacher, [A, B]), rel=1e-5)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[0.0, -1e9, 0.0]]), r"attention_mask holds -1e\+09 to 0; accepted: \(1, 3\), 1 at real tokens"),
        (torch.tensor([[0.5, 1.0, 1.0]]), "attention_mask holds 0.5 to 1; accepted"),
        (torch.ones(1, 3, 3), r"attention_mask has shape \(1, 3, 3\); accepted: \(1, 3\), .* or \(1, 1, 3, 3\)"),
        (torch.ones(1, 2), r"attention_mask has shape \(1, 2\); accepted: \(1, 3\)"),
        ({"full_attention": torch.ones(1, 1, 3, 3)}, "attention_mask is a dict; accepted: a tensor"),
    ],
)
def test_a_mask_of_another_form_is_refused(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        laid_out({"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": mask})


# ---- documents in a row ----


def flattening(**options: Any) -> Any:
    return transformers.DataCollatorWithFlattening(**options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_flash_attn_kwargs": True, "return_seq_idx": True},
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
    ],
    ids=str,
)
def test_documents_flattened_into_a_row_are_those_apart(options: dict[str, Any], tmp_path: Path) -> None:
    student, teacher = llama(1), llama(2)
    right = one_by_one(student, teacher, [A, B])
    assert right == pytest.approx(1.7120, abs=5e-5)
    found = both_ways(student, teacher, APART, tmp_path, collator=flattening(**options))
    assert found == pytest.approx((right, right), rel=1e-5)


@pytest.mark.parametrize(
    "row",
    [
        RESTARTING,
        {**RESTARTING, "labels": [-100, *A[1:], -100, *B[1:]]},
        {**RESTARTING, "attention_mask": [1] * 9},
        {**TOGETHER, "attention_mask": [1] * 4 + [2] * 5},
        {"input_ids": [*A, *B, 0], "attention_mask": [1] * 4 + [2] * 5 + [0], "labels": [*A, *B, 3]},
        {**TOGETHER, "seq_idx": [0] * 4 + [1] * 5},
    ],
    ids=["positions", "boundary unlabelled", "mask of ones", "mask of numbers", "and padding", "seq_idx"],
)
def test_documents_in_an_example_are_those_apart(row: dict[str, Any], tmp_path: Path) -> None:
    """Beside a shorter example, so that there is padding too."""
    student, teacher = llama(1), llama(2)
    other = {**{name: values[:3] for name, values in row.items()}, "labels": [-100, 6, 7]}
    right = one_by_one(student, teacher, [A, B, A[:3]])
    assert both_ways(student, teacher, [row, other], tmp_path) == pytest.approx((right, right), rel=1e-5)
    assert len(TopKCache(tmp_path / "cache")) == 3


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_mixes_documents_is_found_out(name: str) -> None:
    model = build(name)
    if "position_ids" not in takes(model):
        with pytest.raises(ValueError, match=f"the column position_ids .* the model .{type(model).__name__}. does not take it"):
            Inputs.of({"model": model})({one: torch.tensor([values]) for one, values in RESTARTING.items()})
        return
    ids = torch.tensor([A + B])
    with torch.no_grad():
        found = model(input_ids=ids, position_ids=torch.tensor([RESTARTING["position_ids"]]), use_cache=False).logits[:, 4:]
        right = model(input_ids=ids[:, 4:], use_cache=False).logits
    assert mixes_documents(model) == (not torch.allclose(found, right, atol=1e-4))


def test_a_teacher_that_mixes_documents_is_refused_by_name(tmp_path: Path) -> None:
    training = trainer(llama(1), build("opt").float(), [RESTARTING], tmp_path)
    with pytest.raises(ValueError, match=r"the teacher \(OPTForCausalLM, attention eager\) mixes them"):
        training.train()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"position_ids": list(range(9)), "attention_mask": [1] * 4 + [2] * 5}, "position_ids run on where attention_mask"),
        ({"position_ids": [0, 1, 2, 7, 0, 1, 2, 3, 4]}, "position_ids both restart and skip"),
    ],
)
def test_documents_told_in_two_ways_that_disagree_are_refused(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"train_dataset\[0\]: {message}"):
        trainer(llama(1), llama(2), [{**TOGETHER, **more}], tmp_path)


def test_positions_that_skip_are_passed_on_and_cut_no_document(tmp_path: Path) -> None:
    student, teacher = llama(1), llama(2)
    positions = [0, 1, 5, 9]
    example = {"input_ids": A, "labels": A, "position_ids": positions}
    with torch.no_grad():
        given = {"input_ids": torch.tensor([A]), "attention_mask": torch.ones(1, 4), "position_ids": torch.tensor([positions])}
        x, z = (model(**given).logits[0, :-1].double().log_softmax(-1) for model in (student, teacher))
    right = float((z.exp() * (z - x)).sum(-1).mean())
    assert right != pytest.approx(one_by_one(student, teacher, [A]), rel=1e-2)
    assert both_ways(student, teacher, [example], tmp_path) == pytest.approx((right, right), rel=1e-5)


def test_what_counts_is_a_label_behind_a_real_token_of_the_same_document() -> None:
    batch = {
        "input_ids": torch.tensor([[0, 5, 6, 7, 0, 8, 9], [5, 6, 7, 8, 9, 0, 0]]),
        "labels": torch.tensor([[1, 2, 3, 4, 5, 6, 7], [-100, 2, 3, 4, 5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0, 0]]),
    }
    expected = [[-100, 3, 4, -100, -100, 7, -100], [2, 3, 4, 5, -100, -100, -100]]
    assert next_tokens(batch).tolist() == expected
    assert next_tokens(laid_out(batch)).tolist() == expected
    batch["position_ids"] = torch.tensor([[0, 0, 1, 0, 0, 1, 2], [0, 1, 0, 1, 2, 0, 0]])
    expected = [[-100, 3, -100, -100, -100, 7, -100], [2, -100, 4, 5, -100, -100, -100]]
    assert next_tokens(batch).tolist() == expected
    assert next_tokens(laid_out(batch)).tolist() == expected
    assert next_tokens(laid_out(laid_out(batch))).tolist() == expected
    assert [(row, places.tolist()) for row, places, _ in documents(laid_out(batch))][-2:] == [(1, [0, 1]), (1, [2, 3, 4])]


# ---- positions ----


@pytest.mark.parametrize("name", ["gpt2", "biogpt", "llama", "opt", "starcoder2", "bloom"])
def test_hidden_states_are_the_same_with_padding_on_the_left(name: str) -> None:
    model = build(name)
    ids = torch.tensor([A])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    with torch.no_grad():
        alone = hidden_states(model, ids)
        beside = hidden_states(model, {"input_ids": padded, "attention_mask": (torch.arange(7) > 2).long()[None]})[:, 3:]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_positions_of_none_are_left_to_the_model(name: str) -> None:
    model, ids, mask = build(name), torch.tensor([[0, 0, *A]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        found = hidden_states(model, {"input_ids": ids, "attention_mask": mask, "position_ids": None})
        right = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found, right)


def test_positions_run_over_real_tokens_and_on_behind_them() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0], [0] * 8])
    assert positions_of(mask).tolist() == [[0, 0, 0, 1, 1, 2, 3, 4], list(range(8)), list(range(8))]


# ---- ids and lengths ----


@pytest.mark.parametrize("id", [-1, VOCAB])
def test_an_id_that_a_model_does_not_know_is_refused_before_any_work(id: int, tmp_path: Path) -> None:
    data = [*APART, {"input_ids": [id, 5, 6], "labels": [-100, 5, 6]}]
    with pytest.raises(ValueError, match=rf"train_dataset\[2\]: it has the token {id}; accepted: 0 to 60, the .* teacher"):
        trainer(llama(1, vocab=VOCAB + 3), llama(2), data, tmp_path)
    training = trainer(llama(1, vocab=VOCAB + 3), llama(2), APART, tmp_path, collator=lambda _: Collator(None)(data))
    with pytest.raises(ValueError, match=f"the batch has the token {id}; accepted: 0 to 60"):
        training.train()


def test_ids_of_padding_rows_that_no_tokenizer_has_are_refused(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({f"w{number}": number for number in range(50)})
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words))
    args = KDConfig(str(tmp_path), use_cpu=True, report_to=[])
    given = {"teacher": llama(2), "processing_class": tokenizer, "teacher_processing_class": tokenizer}
    KDTrainer(llama(1), args, train_dataset=[{"input_ids": [49, 5]}], **given)
    with pytest.raises(ValueError, match=r"the token 50; accepted: 0 to 49, the tokens that both models know"):
        KDTrainer(llama(1), args, train_dataset=[{"input_ids": [50, 5]}], **given)


@pytest.mark.parametrize("short", ["model", "teacher"])
def test_a_sequence_past_either_models_positions_is_refused_before_any_work(short: str, tmp_path: Path) -> None:
    models = (gpt2(1, 8 if short == "model" else 64), gpt2(2, 8 if short == "teacher" else 64))
    data = [{"input_ids": [5] * 8}, {"input_ids": [5] * 9}]
    with pytest.raises(ValueError, match=rf"train_dataset\[1\]: it has 9 tokens in a sequence, and the {short} \(GPT2.* takes 8"):
        trainer(*models, data, tmp_path)
    left = [{"input_ids": [0, 0, *A, *A], "attention_mask": [0, 0] + [1] * 8, "labels": [-100, -100, *A, *A]}]
    assert math.isfinite(loss(*models, left, tmp_path))  # ten places, eight tokens
    if short == "teacher":
        with pytest.raises(ValueError, match=r"examples\[1\] holds 9 tokens in a sequence, and the teacher"):
            write_cache(models[1], data, tmp_path / "cache", top_k=3)


@pytest.mark.parametrize("short", ["model", "teacher"])
def test_a_student_is_not_let_write_past_either_models_positions(short: str, tmp_path: Path) -> None:
    models = (gpt2(1, 16 if short == "model" else 64), gpt2(2, 16 if short == "teacher" else 64))
    given = {"on_policy_fraction": 1.0, "max_steps": 2}
    message = rf"on_policy_max_new_tokens=16 leaves no room for a prompt: the {short} .* takes 16 .*; accepted: 1 to 15"
    with pytest.raises(ValueError, match=message):
        trainer(*models, APART, tmp_path, on_policy_max_new_tokens=16, **given)
    data = [APART[0], {"input_ids": B, "labels": [-100] * 3 + B[3:]}]
    training = trainer(*models, data, tmp_path, on_policy_max_new_tokens=14, **given)
    # the prompts have two tokens, and three, which leaves no room: that one keeps its data
    batches, _ = training.get_batch_samples(iter(training.get_train_dataloader()), 1, torch.device("cpu"))
    assert sorted(batches[0]["attention_mask"].sum(1).tolist()) == [5, 16]


@pytest.mark.parametrize(
    ("name", "more", "most"),
    [
        ("llama", {"max_position_embeddings": 32}, 32),
        ("gpt2", {}, 64),
        ("mpt", {}, None),
        ("bloom", {}, None),
        ("mamba", {}, None),
        ("rwkv", {"context_length": 8}, None),
        (
            "llama",
            {"max_position_embeddings": 32, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            None,
        ),
        (
            "llama",
            {
                "max_position_embeddings": 32,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                    "rope_theta": 1e4,
                },
            },
            128,
        ),
    ],
)
def test_positions_are_bounded_only_where_the_model_bounds_them(name: str, more: dict[str, Any], most: int | None) -> None:
    assert most_positions(build(name, **more)) == most


@pytest.mark.parametrize("value", [-1, None])
def test_a_configuration_that_gives_no_length_bounds_none(value: Any) -> None:
    model = build("llama")
    vars(model.config)["max_position_embeddings"] = value  # past the check of its type, as an older class has none
    assert most_positions(model) is None


def test_examples_that_teach_nothing_are_said_when_a_cache_is_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    write_cache(llama(2), [{"input_ids": A, "labels": [5, -100, -100, -100]}], tmp_path / "cache", top_k=3)
    assert "No token of the examples counts" in caplog.text


def test_hidden_states_take_the_head_that_goes_with_them() -> None:
    """Derived positions are those of the model's own forward, padded on the right or not at all."""
    model = build("gpt2")
    batch = {"input_ids": torch.tensor([A, A]), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    with torch.no_grad():
        torch.testing.assert_close(nn.functional.linear(hidden_states(model, batch), lm_head(model).weight), model(**batch).logits)


def test_positions_that_say_nothing_do_not_keep_a_student_from_writing(tmp_path: Path) -> None:
    data = [{**example, "position_ids": list(range(len(example["input_ids"])))} for example in APART]
    trainer(llama(1), llama(2), data, tmp_path, on_policy_fraction=1.0, on_policy_max_new_tokens=4).train()
    training = trainer(llama(1), llama(2), [RESTARTING], tmp_path, on_policy_fraction=1.0, on_policy_max_new_tokens=4)
    with pytest.raises(ValueError, match="batch has position_ids, which would not fit text that the student writes"):
        training.train()


def test_batches_from_workers_and_from_datasets_are_the_same(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    student, teacher = llama(1), llama(2)
    data = datasets.Dataset.from_list([PADDED["left"], PADDED["right"]]).with_format("torch")
    found = loss(student, teacher, data, tmp_path, dataloader_num_workers=1)
    assert found == pytest.approx(one_by_one(student, teacher, [A]), rel=1e-5)
    wrong = datasets.Dataset.from_list([{"input_ids": [VOCAB, 5]}])
    with pytest.raises(ValueError, match=rf"train_dataset\[0\]: it has the token {VOCAB}"):
        trainer(student, teacher, wrong, tmp_path)


@pytest.mark.parametrize("name", ["granitemoe", "llama"])
def test_no_cache_of_keys_is_kept_however_a_forward_takes_the_switch(name: str) -> None:
    """granitemoe hands it on to the model below; kept, it would let documents in a row see each other."""
    model, seen = build(name), []
    model.model.register_forward_pre_hook(lambda module, args, options: seen.append(options["use_cache"]), with_kwargs=True)
    with torch.no_grad():
        hidden_states(model, torch.tensor([A]))
    assert seen == [False]


def test_documents_of_a_batch_are_numbered_for_ranks_that_count_each_once() -> None:
    apart = {"input_ids": torch.zeros(2, 3), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 0]])}
    assert document_numbers(apart).tolist() == [[0, 0, 0], [1, 1, 1]]
    row = {"input_ids": torch.zeros(1, 6), "position_ids": torch.tensor([[0, 1, 0, 0, 1, 2]])}
    assert document_numbers(row).tolist() == [[0, 0, 1, 2, 2, 2]]
