"""Examples for caches of a teacher's log-probabilities, and what is right of one."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from kdkernels.console import files
from kdkernels.transformers.cache import TopKCache
from kdkernels.transformers.cache.manifest import shard_name, write_manifest
from tests.support.tiny_models import VOCAB

TOP_K = 7

Examples = list[dict[str, list[int]]]


def draw(lengths: list[int], seed: int = 0) -> Examples:
    """Random tokens, of which about a third do not count."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        labels = ids.where(torch.rand(length, generator=generator) < 0.7, -100)
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return made


EXAMPLES = draw([5, 1, 9, 2, 7, 7, 3, 11, 4, 6, 2])

SHARDS = 3  # of 4 examples

OPTIONS: dict[str, Any] = {"top_k": TOP_K, "batch_size": 3, "shard_examples": 4, "about": {"tokenizer": "t1", "max_length": 16}}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def own(model: Any, ids: list[int], vocab: int, temperature: float) -> Tensor:
    """Log-probabilities (L, vocab) from the model's own logits, in its dtype up to there and then in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :, :vocab]
    return torch.log_softmax(logits.double() / temperature, -1)


def assert_right(cache: TopKCache, model: Any, examples: Examples, vocab: int = VOCAB, temperature: float = 1.0) -> None:
    """Every entry has the log-probability of its token, and no other token is more likely than those listed."""
    twin = copy.deepcopy(model).double()
    exact = {tuple(example["input_ids"]): own(twin, example["input_ids"], vocab, temperature) for example in examples}
    eager = [own(model, list(ids), vocab, temperature) for ids in exact]
    worst = max(float((found - right).abs().max()) for found, right in zip(eager, exact.values(), strict=True))
    largest = max(float(right.abs().max()) for right in exact.values())
    allowed = 4 * worst + 4 * torch.finfo(torch.float32).eps * largest
    for ids, right in exact.items():
        rest = cache.batch(torch.tensor([ids]))["topk_rest"][0]
        found, logprobs = cache.lookup(ids)
        assert found.shape == logprobs.shape == (len(ids), cache.top_k)
        assert (found.dtype, logprobs.dtype) == (torch.int64, torch.float32)
        assert (logprobs.diff(dim=1) <= 0).all()
        assert ((logprobs - right.gather(1, found)).abs() <= allowed).all()
        others = right.scatter(1, found, -math.inf)
        assert ((others < -1e30).sum(1) == cache.top_k).all(), "an id stands twice"
        assert (others.amax(1) <= logprobs[:, -1] + allowed).all()
        everything = torch.full_like(rest, -math.inf)  # where all are listed
        assert torch.where(others.amax(1) < -1e30, rest == everything, (rest - others.logsumexp(1)).abs() <= allowed).all()


def as_version_1(folder: Path) -> None:
    """Make of a cache what an earlier release wrote: without the log-probability of the others."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for number, shard in enumerate(manifest["shards"]):
        tensors, facts = files.load(folder / shard_name(number))
        del tensors["topk_rest"]
        shard["digest"] = files.save(folder / shard_name(number), tensors, facts)
    del manifest["digest"]
    write_manifest(folder, {**manifest, "version": 1})
