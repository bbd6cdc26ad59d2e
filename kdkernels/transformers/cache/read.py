"""A cache of a teacher, read: the entries of an example are found by its tokens."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kdkernels.console import files
from kdkernels.engine.outcomes import LEAST_REST, log_of_rest
from kdkernels.errors import CommandError
from kdkernels.transformers.batches.layout import IGNORED, documents, laid_out
from kdkernels.transformers.cache.documents import key_of, token_ids
from kdkernels.transformers.cache.manifest import COMMAND, INDEX, missing, read_manifest, shard_name

OPEN_SHARDS = 16  # files that a TopKCache keeps open


def is_cache(path: str | Path) -> bool:
    """Whether the folder was made by ``write_cache``, finished or not."""
    return files.marker(Path(path), COMMAND).is_file()


class TopKCache:
    """A folder made by ``write_cache``, read.

    top_k, temperature, vocab_size: as given to ``write_cache``. columns: of the examples, besides ids, labels and mask, that the
    teacher read: an example is found only with the same ones, and they are not kept. tokens: in all examples. tail_mass: the
    probability that the top_k leave to other tokens, mean over the tokens. about: what ``write_cache`` was given under that name.
    len(): examples.

    An example costs 24 bytes of memory; its entries are read from its shard when they are asked for. A shard's digest is verified
    when it is first read. It can be pickled, for the workers of a DataLoader.

    Raises CommandError where the folder is no cache, the cache is not finished, or a file, which it names, is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not is_cache(self.folder):
            name = files.marker(self.folder, COMMAND).name
            raise CommandError(
                f"{folder} is not a cache of a teacher (there is no {name}); accepted: a folder made by python -m kdkernels cache"
            )
        manifest = read_manifest(self.folder)
        self._shard_examples: int = manifest["shard_examples"]
        count = math.ceil(manifest["examples"] / self._shard_examples)
        if manifest["shards"] is None:
            found = sum((self.folder / shard_name(shard)).exists() for shard in range(count))
            raise CommandError(
                f"{folder} is a cache that is not finished ({found} of {count} shards): make it with the same arguments again, "
                "which goes on where it stopped"
            )
        for name in (INDEX, *map(shard_name, range(count))):
            if not (self.folder / name).exists():
                raise missing(self.folder / name)
        index, _ = files.load(self.folder / INDEX, manifest["index"])
        self.top_k: int = manifest["top_k"]
        self.temperature: float = manifest["temperature"]
        self.vocab_size: int = manifest["vocab_size"]
        self.tokens: int = manifest["tokens"]
        self.tail_mass: float = math.fsum(shard["tail_mass"] for shard in manifest["shards"]) / self.tokens
        self.about: dict[str, Any] = manifest["about"]
        self.columns: list[str] = manifest.get("columns", [])
        self._digests: list[str] = [shard["digest"] for shard in manifest["shards"]]
        self._keys, self._order = index["keys"].sort(stable=True)
        self._ends = index["lengths"].cumsum(0)
        self._version: int = manifest["version"]
        self._verified: set[int] = set()
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def __repr__(self) -> str:
        return f"TopKCache({str(self.folder)!r}, {len(self)} examples, top_k={self.top_k}, temperature={self.temperature:g})"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}  # open files stay in their process

    def lookup(self, ids: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """The entries of one example, found by its tokens (L,): ids (L, top_k) int64 and log-probabilities (L, top_k) float32.

        Row i is about the token after the i-th; the most likely stands first. Raises ValueError where no such example was cached.
        """
        found = self._entries(token_ids(ids, "ids"), {})
        return found["topk_ids"], found["topk_logprobs"]

    def batch(self, input_ids: Tensor, attention_mask: Tensor | None = None, **columns: Tensor) -> dict[str, Tensor]:
        """The entries of a batch, each row of which is an example with padding on either side, or several documents.

        input_ids: (B, S) integers. attention_mask: (B, S), 0 at the padding; None: there is none. columns: position_ids (B, S),
        which restart where a document begins, and whatever else the teacher read, (B, S) or one entry for each row.

        Returns {"topk_ids": (B, S, top_k) int64, "topk_logprobs": (B, S, top_k) float32, "topk_rest": (B, S) float32, the
        log-probability of all others} on the device of input_ids. At the padding the distribution is uniform: finite where top_k
        is not all, and of no weight in a loss that follows the labels.

        Raises ValueError for shapes that do not fit, and as ``lookup`` does.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids is (batch, tokens), got shape {tuple(input_ids.shape)}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; accepted: {tuple(input_ids.shape)}, as input_ids"
            )
        here = input_ids.cpu()
        found = {
            "topk_ids": torch.arange(self.top_k).expand(*here.shape, -1).clone(),
            "topk_logprobs": torch.full((*here.shape, self.top_k), -math.log(self.vocab_size)),
            "topk_rest": torch.full(here.shape, 1 - self.top_k / self.vocab_size).log(),
        }
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **columns}
        for row, places, further in documents(laid_out({name: value for name, value in given.items() if value is not None})):
            for name, entries in self._entries(here[row, places], further).items():
                found[name][row, places] = entries
        return {name: tensor.to(input_ids.device) for name, tensor in found.items()}

    def examples(self) -> Sequence[dict[str, list[int]]]:
        """The examples themselves, {"input_ids": ..., "labels": ...} as ``write_cache`` was given them, read when asked for."""
        return _Examples(self)

    def example(self, number: int) -> dict[str, list[int]]:
        """One of them, in the order in which they were cached."""
        shard, rows = self._place(number)
        file = self._shard(shard)
        ids, counts = file.get_slice("input_ids")[rows], file.get_slice("counts")[rows]
        return {"input_ids": ids.tolist(), "labels": ids.where(counts != 0, IGNORED).tolist()}

    def _entries(self, ids: Tensor, further: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What was kept at each token (L,) of an example that has further columns."""
        shard, rows = self._find(ids, further)
        file = self._shard(shard)
        logprobs = file.get_slice("topk_logprobs")[rows].clone()
        rest = file.get_slice("topk_rest")[rows].clone() if self._version > 1 else _estimated_rest(logprobs, self.vocab_size)
        return {"topk_ids": file.get_slice("topk_ids")[rows].to(torch.int64), "topk_logprobs": logprobs, "topk_rest": rest}

    def _find(self, ids: Tensor, further: Mapping[str, Tensor]) -> tuple[int, slice]:
        key = key_of(ids, further)
        at = int(torch.searchsorted(self._keys, key))
        while at < len(self) and self._keys[at] == key:
            shard, rows = self._place(int(self._order[at]))
            if torch.equal(self._shard(shard).get_slice("input_ids")[rows].to(torch.int64), ids):
                return shard, rows
            at += 1
        first = ", ".join(map(str, ids[:8].tolist()))
        having = f" with {', '.join(further)}" if further else ""
        made = f" (it was made with {', '.join(self.columns)})" if self.columns else ""
        raise ValueError(
            f"an example of {len(ids)} tokens ({first}{', ...' if len(ids) > 8 else ''}){having} is not in the cache "
            f"{self.folder}{made}: the data, the tokenizer or the longest length differ from those that it was made from"
        )

    def _place(self, example: int) -> tuple[int, slice]:
        """Shard of an example, and its rows there."""
        shard = example // self._shard_examples
        first = shard * self._shard_examples
        offset, begin = (int(self._ends[before - 1]) if before else 0 for before in (first, example))
        return shard, slice(begin - offset, int(self._ends[example]) - offset)

    def _shard(self, shard: int) -> Any:
        """The opened file; of many the one used longest ago is closed."""
        if shard not in self._open:
            path = self.folder / shard_name(shard)
            if not path.exists():
                raise missing(path)
            if shard not in self._verified:
                files.load(path, self._digests[shard])
                self._verified.add(shard)
            self._open[shard] = safe_open(path, "pt")
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]


class _Examples(Sequence[dict[str, list[int]]]):
    def __init__(self, cache: TopKCache) -> None:
        self._cache = cache

    def __len__(self) -> int:
        return len(self._cache)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self._cache.example(each) for each in range(len(self))[number]]
        return self._cache.example(range(len(self))[number])


def _estimated_rest(logprobs: Tensor, vocab: int) -> Tensor:
    """The log-probability of all other tokens where it was not kept: logprobs (L, top_k) -> (L,). What the top_k leave of 1, but
    not less than float32 tells, nor more than tokens can have that are no likelier than the last of the top_k."""
    given = logprobs.double()
    left = log_of_rest(given, torch.full_like(given[:, 0], LEAST_REST))
    most = given[:, -1] + torch.tensor(vocab - logprobs.shape[1], dtype=torch.float64).log()
    return torch.minimum(left, most).float()
