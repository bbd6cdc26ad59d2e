"""What a cache gives for examples and batches."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from kdkernels.errors import CommandError
from kdkernels.transformers.cache import TopKCache, documents, is_cache, read, write_cache
from tests.support.caches import EXAMPLES, OPTIONS, TOP_K, assert_right
from tests.support.tiny_models import VOCAB


def test_only_what_was_made_by_write_cache_is_a_cache(whole: Path, tmp_path: Path) -> None:
    assert is_cache(whole)
    assert is_cache(str(whole))
    for other in (tmp_path, tmp_path / "nothing", whole / "manifest.json"):
        assert not is_cache(other)
        with pytest.raises(CommandError, match=r"is not a cache of a teacher \(there is no kdkernels-cache\.json\)"):
            TopKCache(other)


def test_an_unknown_example_is_refused_with_its_tokens(whole: Path) -> None:
    cache = TopKCache(whole)
    known = EXAMPLES[7]["input_ids"]
    for ids in (known[:-1], [*known, 5], [known[0] + 1, *known[1:]], [known[0] + 2**32, *known[1:]], []):
        first = ", ".join(map(str, ids[:8]))
        with pytest.raises(ValueError, match=rf"an example of {len(ids)} tokens \({first}.* is not in the cache .*tokenizer"):
            cache.lookup(ids)
    with pytest.raises(TypeError, match=r"ids is a sequence of integers, got shape \(3,\), torch.float32"):
        cache.lookup([0.0, 1.0, 2.0])


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_padded_batch_gets_the_entries_of_its_examples(whole: Path, side: str) -> None:
    cache = TopKCache(whole)
    rows = [example["input_ids"] for example in (EXAMPLES[7], EXAMPLES[1], EXAMPLES[4])]
    width = 15
    ids, mask = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        start = {"left": width - len(tokens), "right": 0, "both": 2}[side]
        ids[row, start : start + len(tokens)], mask[row, start : start + len(tokens)] = torch.tensor(tokens), 1
    batch = cache.batch(ids, mask)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()} == {
        "topk_ids": ((3, width, TOP_K), torch.int64),
        "topk_logprobs": ((3, width, TOP_K), torch.float32),
        "topk_rest": ((3, width), torch.float32),
    }
    for row, tokens in enumerate(rows):
        alone = cache.batch(torch.tensor([tokens]))
        for name, expected in zip(batch, (*cache.lookup(tokens), alone["topk_rest"][0]), strict=True):
            assert torch.equal(batch[name][row, mask[row] == 1], expected)
    padding = batch["topk_logprobs"][mask == 0].double()
    torch.testing.assert_close(padding, torch.full_like(padding, -math.log(VOCAB)), rtol=1e-7, atol=0)
    whole_mass = TOP_K * padding[:, 0].exp() + batch["topk_rest"][mask == 0].double().exp()
    torch.testing.assert_close(whole_mass, torch.ones_like(whole_mass), rtol=1e-6, atol=0)
    assert (batch["topk_ids"][mask == 0] == torch.arange(TOP_K)).all()
    assert torch.equal(cache.batch(ids, mask.bool())["topk_ids"], batch["topk_ids"])


def test_a_batch_without_a_mask_has_no_padding(whole: Path) -> None:
    cache = TopKCache(whole)
    ids = torch.tensor([EXAMPLES[4]["input_ids"], EXAMPLES[5]["input_ids"]])
    for row, found in enumerate(cache.batch(ids)["topk_logprobs"]):
        assert torch.equal(found, cache.lookup(ids[row])[1])
    with pytest.raises(ValueError, match=r"input_ids is \(batch, tokens\), got shape \(7,\)"):
        cache.batch(ids[0])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 6\); accepted: \(2, 7\)"):
        cache.batch(ids, torch.ones(2, 6))


def test_the_examples_come_back_with_what_counts(whole: Path) -> None:
    examples = TopKCache(whole).examples()
    assert len(examples) == len(EXAMPLES)
    assert list(examples) == EXAMPLES
    assert examples[-2] == EXAMPLES[-2]
    assert examples[2:9:3] == EXAMPLES[2:9:3]
    with pytest.raises(IndexError):
        examples[len(EXAMPLES)]


def test_without_labels_everything_counts_and_padding_is_left_out(llama: Any, tmp_path: Path) -> None:
    ids = EXAMPLES[2]["input_ids"]
    padded = {"input_ids": [0, 0, *ids, 0], "labels": [-100] * 3 + ids[1:] + [-100], "attention_mask": [0, 0, *[1] * len(ids), 0]}
    cache = write_cache(llama, [{"input_ids": ids[1:]}, padded], tmp_path / "new", top_k=TOP_K)
    plain = {"input_ids": ids, "labels": [-100, *ids[1:]]}
    assert list(cache.examples()) == [{"input_ids": ids[1:], "labels": ids[1:]}, plain]
    assert_right(cache, llama, [plain])


def test_entries_are_found_though_all_hashes_are_the_same(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (documents, read):
        monkeypatch.setattr(module, "key_of", lambda ids, further: -5)
    assert_right(write_cache(llama, EXAMPLES, tmp_path / "new", **OPTIONS), llama, EXAMPLES)


def test_few_files_stay_open_and_a_pickled_cache_opens_its_own(llama: Any, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "OPEN_SHARDS", 2)
    cache = TopKCache(whole)
    assert_right(cache, llama, EXAMPLES)
    assert len(cache._open) == 2
    other = pickle.loads(pickle.dumps(cache))
    assert not other._open
    assert_right(other, llama, EXAMPLES[::-1])
    assert list(pickle.loads(pickle.dumps(cache.examples()))) == EXAMPLES


def test_a_result_may_be_written_to(whole: Path) -> None:
    cache = TopKCache(whole)
    ids = EXAMPLES[0]["input_ids"]
    before = [tensor.clone() for tensor in cache.lookup(ids)]
    for tensor in cache.lookup(ids):
        tensor.zero_()
    assert all(torch.equal(*pair) for pair in zip(before, cache.lookup(ids), strict=True))
