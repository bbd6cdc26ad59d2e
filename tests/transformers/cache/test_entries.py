"""What a cache lists of a teacher, held against the model's own logits in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import kdkernels as kd
from kdkernels.errors import CommandError
from kdkernels.transformers import lm_head
from kdkernels.transformers.cache import TopKCache, write_cache
from kdkernels.transformers.cache.most_likely import MostLikely
from tests.support.caches import EXAMPLES, OPTIONS, TOP_K, as_version_1, assert_right, own
from tests.support.cases import InsideOperators
from tests.support.tiny_models import VOCAB, build


@pytest.mark.parametrize(
    ("name", "dtype", "temperature", "vocab"),
    [
        ("llama", torch.float32, 1.0, None),
        ("llama", torch.bfloat16, 1.0, None),
        ("llama", torch.float64, 0.3, None),
        ("gemma2", torch.float32, 2.5, None),  # softcap
        ("gemma2", torch.float16, 1.0, 50),
        ("phi", torch.float32, 1.0, 50),  # bias
        ("granite", torch.float32, 1.5, None),  # scale
        ("gpt2", torch.float32, 1.0, None),  # positions that are counted from the left
        ("mamba", torch.float32, 1.0, None),  # no attention, so no mask of it
    ],
    ids=str,
)
def test_entries_are_the_largest_of_the_models_own_logits(
    tmp_path: Path, name: str, dtype: torch.dtype, temperature: float, vocab: int | None
) -> None:
    """Batches of three, padded, and logits of two tokens at a time."""
    model = build(name).to(dtype)
    options = {**OPTIONS, "temperature": temperature, "vocab_size": vocab, "memory_budget": 2 * VOCAB * 12}
    cache = write_cache(model, EXAMPLES, tmp_path / "new", **options)
    assert (cache.temperature, cache.vocab_size, cache.top_k) == (temperature, vocab or VOCAB, TOP_K)
    assert_right(cache, model, EXAMPLES, vocab or VOCAB, temperature)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_neighbours_in_a_batch_change_nothing_but_rounding(llama: Any, tmp_path: Path, batch_size: int) -> None:
    backwards = EXAMPLES[::-1]
    cache = write_cache(llama, backwards, tmp_path / "new", **{**OPTIONS, "batch_size": batch_size, "shard_examples": 64})
    assert_right(cache, llama, EXAMPLES)
    assert list(cache.examples()) == backwards


def test_all_of_a_vocabulary_may_be_listed(llama: Any, tmp_path: Path) -> None:
    cache = write_cache(llama, EXAMPLES[:2], tmp_path / "new", top_k=VOCAB)
    assert cache.tail_mass < 1e-6
    assert_right(cache, llama, EXAMPLES[:2])


def test_what_a_confident_teacher_leaves_to_others_keeps_its_digits(tmp_path: Path) -> None:
    """Its listed probabilities sum to 1 in float32, so that the rest is not to be had from them."""
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(200)
    cache = write_cache(model, EXAMPLES, tmp_path / "new", **OPTIONS)
    assert_right(cache, model, EXAMPLES)
    found = cache.batch(torch.tensor([EXAMPLES[7]["input_ids"]]))
    lost = found["topk_logprobs"].exp().sum(-1) >= 1
    assert lost.any()
    assert (found["topk_rest"][lost] > -math.inf).all()


def test_a_cache_of_the_earlier_version_is_still_read(llama: Any, whole: Path, folder: Path) -> None:
    as_version_1(folder)
    old, new = TopKCache(folder), TopKCache(whole)
    ids = torch.tensor([EXAMPLES[7]["input_ids"]])
    found, right = old.batch(ids), new.batch(ids)
    assert found.keys() == right.keys()
    for name in ("topk_ids", "topk_logprobs"):
        assert torch.equal(found[name], right[name])
    torch.testing.assert_close(found["topk_rest"], right["topk_rest"], rtol=0, atol=1e-5)
    assert list(old.examples()) == EXAMPLES
    with pytest.raises(CommandError, match=r"holds another cache: version is 1 there and 2 here; accepted: the same, or another"):
        write_cache(llama, EXAMPLES, folder, **OPTIONS)


def test_where_the_rest_was_not_kept_it_is_no_likelier_than_the_last_that_was(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(200)
    write_cache(model, EXAMPLES, tmp_path / "new", **OPTIONS)
    ids = torch.tensor([EXAMPLES[7]["input_ids"]])
    kept = TopKCache(tmp_path / "new").batch(ids)["topk_rest"]
    as_version_1(tmp_path / "new")
    found = TopKCache(tmp_path / "new").batch(ids)
    assert (found["topk_rest"] <= found["topk_logprobs"][..., -1] + math.log(VOCAB - TOP_K) + 1e-6).all()
    assert ((found["topk_rest"] >= kept - 1e-5) | (found["topk_rest"].exp() > 1e-6)).all()
    assert (found["topk_rest"] > -math.inf).all()


def test_the_tail_is_the_probability_of_all_others(llama: Any, whole: Path) -> None:
    cache = TopKCache(whole)
    rows = torch.cat([own(llama, example["input_ids"], VOCAB, 1.0) for example in EXAMPLES])
    rest = rows.exp().sort(1).values[:, :-TOP_K].sum(1).mean()
    assert cache.tokens == len(rows)
    assert cache.tail_mass == pytest.approx(float(rest), rel=1e-5)


def test_a_banned_token_is_listed_last_and_finite_ones_are_right(tmp_path: Path) -> None:
    model = build("phi")
    with torch.no_grad():
        model.lm_head.bias[5:] = -math.inf  # five are left, of seven that are asked for
    cache = write_cache(model, EXAMPLES[:3], tmp_path / "new", top_k=TOP_K)
    ids, logprobs = cache.lookup(EXAMPLES[0]["input_ids"])
    assert logprobs[:, :5].isfinite().all()
    assert (ids[:, :5].sort(1).values == torch.arange(5)).all()
    assert (logprobs[:, 5:] == -math.inf).all()


def test_a_teacher_without_a_distribution_is_refused(tmp_path: Path) -> None:
    model = build("phi")
    with torch.no_grad():
        model.lm_head.bias[:] = -math.inf
    with pytest.raises(ValueError, match=r"log-probabilities of example 2 are NaN"):  # the longest goes first
        write_cache(model, EXAMPLES[:3], tmp_path / "new", top_k=TOP_K)


def test_a_head_that_is_not_what_it_seems_is_refused_before_any_shard(tmp_path: Path) -> None:
    model = build("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match="the head given does not make the logits"):
        write_cache(model, EXAMPLES, tmp_path / "new", **OPTIONS)
    assert not list((tmp_path / "new").glob("shard*"))


def test_the_teacher_is_left_as_it_was(tmp_path: Path) -> None:
    model = build("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_cache(model, EXAMPLES, tmp_path / "new", **OPTIONS)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


class Largest(InsideOperators):
    """Bytes of the largest memory that any operator's result lies in."""

    bytes = 0

    def after(self, name: str, made: Any) -> None:
        for tensor in made if isinstance(made, (list, tuple)) else (made,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_never_exist_for_more_tokens_than_the_budget_holds(dtype: torch.dtype) -> None:
    vocab, budget = 4096, 2**19
    model = build("llama", vocab_size=vocab).to(dtype)
    head = lm_head(model)
    found = []
    for batch_size in (1, 4, 16):
        sequences = [torch.arange(40) for _ in range(batch_size)]
        kd.free_scratch()
        options = {"top_k": 4, "temperature": 1.0, "vocab": vocab, "budget": budget}
        teacher = MostLikely(model, head, **options)
        with Largest() as largest:
            ids, *_ = teacher(sequences)
        assert ids.shape == (40 * batch_size, 4)
        found.append(largest.bytes)
    widened = 4 * head.weight.numel()  # a block of the head in float32, beside the logits in one scratch
    assert max(found) <= budget + widened
    assert found[0] == found[1] == found[2] < 40 * vocab * 4 * 2
