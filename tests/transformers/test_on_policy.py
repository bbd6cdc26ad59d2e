"""Batches that the student writes: its tokens are those of the model alone, chance is repeatable, and nothing else moves."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from tests.support.writing import Parrot, data, lively, most_likely, responses, rows, written

transformers = pytest.importorskip("transformers")
from kdkernels.transformers.on_policy import OnPolicy  # noqa: E402
from tests.support.tiny_models import VOCAB, build  # noqa: E402

Z = 5.0  # standard deviations that a count may be off: less than once in a million counts by chance


@pytest.fixture(scope="module")
def llama() -> Any:
    return lively("llama")


# ---- the text ----


@pytest.mark.parametrize("left", [False, True], ids=["right-padded", "left-padded"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3_softcap", "bloom", "mamba", "rwkv", "recurrent_gemma"])
def test_with_top_k_1_the_text_is_what_the_model_finds_most_likely_alone(name: str, left: bool) -> None:
    """Padding, positions and caches change nothing: also in models that take padding in (the last two)."""
    model, batch = lively(name), data((3, 6, 1), left=left)
    found = written(model, batch, top_k=1, max_new_tokens=6)
    for row, prompt, response, made in zip(rows(batch), (3, 6, 1), responses(found), rows(found), strict=True):
        assert made[:prompt] == row[:prompt]
        assert made[prompt:] == response == most_likely(model, row[:prompt], 6)
    assert len({token for response in responses(found) for token in response}) > 3  # else a wrong cache would not show


def test_a_response_goes_up_to_its_first_end_token_and_counts_with_it(llama: Any) -> None:
    batch = data((3, 6, 1), (4, 2, 5))
    free = responses(written(llama, batch, top_k=1, max_new_tokens=6))
    ends = [free[0][2], free[1][0]]
    found = written(llama, batch, top_k=1, max_new_tokens=6, eos_token_id=ends)
    lengths = [next((place + 1 for place, token in enumerate(full) if token in ends), 6) for full in free]
    assert len(set(lengths)) > 1  # rows that end apart
    assert responses(found) == [full[:length] for full, length in zip(free, lengths, strict=True)]
    width = max(prompt + length for prompt, length in zip((3, 6, 1), lengths, strict=True))
    assert found["input_ids"].shape == (3, width)
    for prompt, length, mask, labels in zip((3, 6, 1), lengths, found["attention_mask"], found["labels"], strict=True):
        assert mask.tolist() == [1] * (prompt + length) + [0] * (width - prompt - length)
        assert (labels != -100).tolist() == [False] * prompt + [True] * length + [False] * (width - prompt - length)


def test_an_end_token_in_the_prompt_ends_nothing_and_may_be_the_padding(llama: Any) -> None:
    batch = data((4, 2, 4))
    end = rows(batch)[0][1]
    free, found = (
        written(llama, batch, top_k=1, max_new_tokens=5, **more) for more in ({}, {"eos_token_id": end, "pad_token_id": end})
    )
    assert end not in responses(free)[0]
    assert rows(found)[0] == rows(free)[0]


def test_plain_text_is_continued_from_its_middle(llama: Any) -> None:
    batch = data((0, 0, 0, 0), (8, 5, 1, 2))
    found = written(llama, batch, max_new_tokens=3)
    assert [len(row) for row in rows(found)] == [4 + 3, 2 + 3, 1 + 3, 1 + 3]
    assert [row[:-3] for row in rows(found)] == [row[:half] for row, half in zip(rows(batch), (4, 2, 1, 1), strict=True)]


def test_without_an_attention_mask_padding_on_the_right_is_known_by_its_labels(llama: Any) -> None:
    batch = data((2, 0), (8, 6))
    bare = {name: batch[name] for name in ("input_ids", "labels")}
    masked, found = (written(llama, given, top_k=1, max_new_tokens=3) for given in (batch, bare))
    assert {name: value.tolist() for name, value in found.items()} == {name: value.tolist() for name, value in masked.items()}


def test_rows_that_teach_nothing_or_leave_no_room_keep_their_data(llama: Any) -> None:
    batch = data((3, 5, 2), (4, 3, 4))
    batch["labels"][0] = -100
    found = written(llama, batch, max_new_tokens=2)
    assert rows(found)[0] == rows(batch)[0]
    assert [len(one) for one in responses(found)] == [0, 2, 2]

    small, batch = lively("gpt2", n_positions=8), data((3, 6, 2), (4, 1, 5))
    found = written(small, batch, max_new_tokens=3)
    assert [len(row) for row in rows(found)] == [6, 7, 5]
    assert rows(found)[1] == rows(batch)[1]
    assert responses(found)[1] == rows(batch)[1][6:]


@pytest.mark.parametrize("schedule", ["constant", "adaptive"])
def test_a_batch_of_which_nothing_can_be_continued_is_the_data(llama: Any, schedule: str) -> None:
    batch = data()
    batch["labels"].fill_(-100)
    found, source = OnPolicy(1.0, schedule=schedule).batch(llama, batch, step=0, micro=0, progress=0.0)
    assert source == "data"
    assert all(found[name] is batch[name] for name in batch)


def test_new_batches_have_the_dtypes_of_the_old_one(llama: Any) -> None:
    batch = data()
    batch = {"input_ids": batch["input_ids"].int(), "attention_mask": batch["attention_mask"].bool(), "labels": batch["labels"]}
    found = written(llama, batch, max_new_tokens=2)
    assert {name: value.dtype for name, value in found.items()} == {name: value.dtype for name, value in batch.items()}
    del batch["attention_mask"]
    assert written(llama, batch, max_new_tokens=2)["attention_mask"].dtype == torch.int32


def test_tokens_beyond_the_shared_vocabulary_are_never_written(llama: Any) -> None:
    batch = data()
    found = written(llama, batch, top_k=1, max_new_tokens=6, vocab_size=20)
    for row, prompt, response in zip(rows(batch), (3, 6, 1), responses(found), strict=True):
        assert response == most_likely(llama, row[:prompt], 6, allowed=20)
    assert max(max(one) for one in responses(written(llama, batch, top_k=1, max_new_tokens=6))) >= 20


# ---- the sampling ----


def quantile(freedom: int) -> float:
    """What a chi-square of that many degrees of freedom stays below, but for once in a million (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.753 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (2.0, 0, 1.0), (0.5, 0, 1.0), (1.5, 0, 0.7), (1.5, 5, 1.0)]
)
def test_tokens_are_sampled_from_the_distribution_that_was_asked_for(
    llama: Any, temperature: float, top_k: int, top_p: float
) -> None:
    batch = data((4,) * 200, (1,) * 200)
    batch["input_ids"][:] = batch["input_ids"][0]
    with torch.no_grad():
        logits = llama(input_ids=batch["input_ids"][:1, :4]).logits[0, -1].double()
    p = (logits / temperature).softmax(0)
    order = p.argsort(descending=True)
    kept = int((p[order].cumsum(0) < top_p).sum()) + 1 if top_p < 1 else top_k or VOCAB
    expected = torch.zeros_like(p)
    expected[order[:kept]] = p[order[:kept]] / p[order[:kept]].sum()
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": 1}
    found = [responses(written(llama, batch, step=step, **options)) for step in range(10)]
    drawn = torch.tensor([token for batch in found for (token,) in batch])
    counts = drawn.bincount(minlength=VOCAB).double()
    assert not counts[expected == 0].any()
    many = expected * len(drawn) >= 5
    observed = torch.cat([counts[many], counts[~many].sum()[None]])
    means = torch.cat([expected[many], expected[~many].sum()[None]]) * len(drawn)
    observed, means = observed[means > 0], means[means > 0]
    assert len(means) > 2
    assert float(((observed - means) ** 2 / means).sum()) <= quantile(len(means) - 1)


def test_the_models_own_generation_settings_do_not_reach_the_sampling(llama: Any) -> None:
    model, batch = copy.deepcopy(llama), data()
    free = responses(written(llama, batch, top_k=1, max_new_tokens=6, eos_token_id=VOCAB - 1))
    lengths = {"max_length": 3, "min_length": 30, "exponential_decay_length_penalty": (0, 9.0), "eos_token_id": free[0][1]}
    tokens = {"forced_eos_token_id": 5, "suppress_tokens": [free[0][0]], "bad_words_ids": [[free[1][0]]]}
    sampling = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "typical_p": 0.1, "min_p": 0.9, "epsilon_cutoff": 0.5}
    modes = {"num_beams": 3, "guidance_scale": 3.0, "return_dict_in_generate": True, "cache_implementation": "static"}
    model.generation_config.update(**lengths, **tokens, **sampling, **modes)
    assert responses(written(model, batch, top_k=1, max_new_tokens=6, eos_token_id=VOCAB - 1)) == free


# ---- repeatable, and beside everything else ----


def test_tokens_follow_from_seed_step_micro_batch_and_rank(llama: Any) -> None:
    batch = data((4, 4), (4, 4))

    def text(seed: int = 0, step: int = 0, micro: int = 0, rank: int = 0) -> str:
        writer = OnPolicy(1.0, seed=seed, max_new_tokens=8)
        return str(rows(writer.batch(llama, batch, step=step, micro=micro, progress=0.0, rank=rank)[0]))

    assert text() == text()
    torch.manual_seed(1)
    torch.rand(3)
    variants = [text(), text(seed=1), text(step=1), text(micro=1), text(rank=1)]
    assert len(set(variants)) == len(variants)


def test_ranks_agree_on_the_source_and_a_resumed_run_repeats_it() -> None:
    def sources(rank: int, start: int) -> list[str]:
        writer = OnPolicy(0.5, seed=3)
        calls = ((step, micro) for step in range(start, 40) for micro in range(2))
        return [writer.batch(Parrot(), data(), step=step, micro=micro, progress=0.0, rank=rank)[1] for step, micro in calls]

    assert sources(0, 0) == sources(5, 0)
    assert sources(0, 20) == sources(0, 0)[40:]
    assert sources(0, 0)[::2] != sources(0, 0)[1::2]


def fails(*_: Any, **__: Any) -> None:
    raise RuntimeError("no logits today")


@pytest.mark.parametrize("failing", [False, True])
def test_random_numbers_modes_and_settings_are_untouched(llama: Any, failing: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Gradient checkpointing, which forbids caches in training mode, is neither in the way nor switched off; also on an error."""
    model = copy.deepcopy(llama)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    model.generation_config.temperature = 0.3
    model.train()
    model.model.layers[0].eval()
    if failing:
        model.lm_head.forward = fails
    modes = {name: module.training for name, module in model.named_modules()}
    generation, config, before = model.generation_config, model.config.to_dict(), model.generation_config.to_dict()
    state = torch.get_rng_state()
    if failing:
        with pytest.raises(RuntimeError, match="no logits today"):
            written(model, data(), max_new_tokens=3)
    else:
        assert rows(written(model, data(), max_new_tokens=3, top_k=1)) == rows(written(llama, data(), max_new_tokens=3, top_k=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.generation_config is generation
    assert model.generation_config.to_dict() == before
    assert model.config.to_dict() == config
    assert model.is_gradient_checkpointing
    assert torch.is_grad_enabled()
    assert not caplog.records


def test_training_goes_on_under_autocast_after_the_student_has_written(llama: Any) -> None:
    """Weights that were cast without a gradient are not found again by the step."""
    model = copy.deepcopy(llama).train()
    with torch.autocast("cpu", torch.bfloat16):
        batch = written(model, data(), max_new_tokens=3)
        model(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_data_that_is_chosen_goes_through_as_it_came() -> None:
    batch, model = data(), Parrot()
    found, source = OnPolicy(0.0).batch(model, batch, step=0, micro=0, progress=0.0)
    assert source == "data"
    assert all(found[name] is batch[name] for name in batch)
    assert model.asked == 0


# ---- what wraps a model ----


def test_the_adapters_of_peft_write_too(llama: Any) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.5, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(llama), lora).train()
    batch = data()
    found = written(model, batch, top_k=1, max_new_tokens=6)
    assert all(module.training for module in model.modules())
    model.eval()
    expected = [most_likely(model, row[:prompt], 6) for row, prompt in zip(rows(batch), (3, 6, 1), strict=True)]
    assert responses(found) == expected
    assert expected != responses(written(llama, batch, top_k=1, max_new_tokens=6))


def test_virtual_tokens_of_peft_are_refused(llama: Any) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"PromptTuningConfig, .* accepted: LoRA"):
        written(peft.get_peft_model(copy.deepcopy(llama), settings), data())


def test_a_compiled_model_writes_without_being_compiled(llama: Any) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("compiled")

    inside = copy.deepcopy(llama)
    inside.compile(backend=refuse)
    for model in (torch.compile(llama, backend=refuse), inside):
        assert rows(written(model, data(), max_new_tokens=3)) == rows(written(llama, data(), max_new_tokens=3))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fraction": 1.1}, ValueError, r"fraction is a number in \[0, 1\], got 1.1"),
        ({"fraction": math.nan}, ValueError, "fraction"),
        ({"fraction": "half"}, TypeError, "fraction .* got str"),
        ({"schedule": "linear"}, ValueError, "schedule 'linear' is not known; accepted: constant, adaptive"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is a whole number of at least 1, got 0"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens .* got float"),
        ({"temperature": 0.0}, ValueError, "temperature is a positive number, got 0"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"top_p": 0.0}, ValueError, r"top_p is a number in \(0, 1\], got 0"),
        ({"top_p": 1.01}, ValueError, "top_p"),
        ({"replay_size": 0}, ValueError, "replay_size"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id"),
        ({"eos_token_id": []}, ValueError, "eos_token_id .* empty"),
        ({"eos_token_id": [2, None]}, TypeError, "eos_token_id .* got NoneType"),
        ({"vocab_size": 0}, ValueError, "vocab_size"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OnPolicy(**{"fraction": 0.5, **options})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"position_ids": torch.zeros(3, 9), "topk_ids": torch.zeros(3, 9)}, ValueError, "batch has position_ids, topk_ids"),
        ({"labels": None}, ValueError, "batch has no labels"),
        ({"labels": torch.zeros(3, 8)}, ValueError, r"labels.*\(3, 8\)"),
        ({"attention_mask": [[1]]}, TypeError, "attention_mask.* got list"),
    ],
)
def test_bad_batches_are_named_whatever_the_coin_says(change: dict[str, Any], error: type[Exception], message: str) -> None:
    batch = {name: value for name, value in {**data(), **change}.items() if value is not None}
    with pytest.raises(error, match=message):
        OnPolicy(0.0).batch(Parrot(), batch, step=0, micro=0, progress=0.0)


def test_bad_calls_are_named(llama: Any) -> None:
    call: dict[str, Any] = {"step": 0, "micro": 0, "progress": 0.0}
    with pytest.raises(TypeError, match="batch is a mapping"):
        OnPolicy(0.5).batch(llama, [data()], **call)  # type: ignore[arg-type]
    for name, value in {"step": -1, "micro": -1, "rank": -1, "progress": 1.1}.items():
        with pytest.raises(ValueError, match=name):
            OnPolicy(0.5).batch(llama, data(), **{**call, name: value})
    with pytest.raises(ValueError, match=r"replay_size=2 .* 3 rows"):
        OnPolicy(0.5, schedule="adaptive", replay_size=2).batch(llama, data(), **call)
    with pytest.raises(ValueError, match=r"max_new_tokens=64 leaves no room .* 64 positions of GPT2LMHeadModel"):
        OnPolicy(0.5, max_new_tokens=64).batch(build("gpt2"), data(), **call)
    with pytest.raises(ValueError, match="LlamaModel cannot generate"):
        OnPolicy(0.5).batch(llama.model, data(), **call)
    with pytest.raises(TypeError, match="validation_loss is a number, got Tensor"):
        OnPolicy(0.5).observe(torch.tensor(1.0))  # type: ignore[arg-type]
