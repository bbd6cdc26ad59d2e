"""A teacher's most likely tokens and their log-probabilities on disk, so that a student can be distilled without the teacher.

The folder holds

- shard-00000.safetensors, ...: the tokens of some examples one after another, which of them count, the lengths of the examples, and
  for every token the ids and log-probabilities of the top_k most likely next tokens and the log-probability of all others;
- index.safetensors: a hash of each example's tokens, by which ``TopKCache`` finds an example, and its length;
- manifest.json: settings, and digests of teacher, data and files;
- tokenizer/: the tokenizer of the text, where ``python -m kdkernels cache`` made it;
- kdkernels-cache.json: the marker by which the folder is known.

Every file is written whole and carries a digest of its content; the same inputs make the same bytes. A shard knows which cache it
belongs to, so that a run that was cut off goes on from the shards that are there. The manifest is complete once all of them are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kdkernels.console import files
from kdkernels.engine.outcomes import LEAST_REST, log_of_rest
from kdkernels.errors import CommandError
from kdkernels.losses.checks import LMHead
from kdkernels.planning.plan import default_budget
from kdkernels.scalars import temperature_of
from kdkernels.transformers.batches import IGNORED, Inputs, documents, laid_out
from kdkernels.transformers.data import Collator
from kdkernels.transformers.finite import check_weights
from kdkernels.transformers.heads import lm_head, unwrapped
from kdkernels.transformers.modes import evaluating, restored
from kdkernels.transformers.most_likely import MostLikely
from kdkernels.transformers.verify import verify_lm_head

logger = logging.getLogger(__name__)

COMMAND = "cache"
MANIFEST, INDEX, TOKENIZER = "manifest.json", "index.safetensors", "tokenizer"
VERSION = 2
READABLE = (1, VERSION)  # of version 1 the log-probability of the others was not kept
OPEN_SHARDS = 16  # files that a TopKCache keeps open
# What of a configuration says where a model came from, not what it computes.
PROVENANCE = ("_name_or_path", "transformers_version")

Progress = Callable[[int, int], None]


def write_cache(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    folder: str | Path,
    *,
    top_k: int = 64,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    batch_size: int = 8,
    shard_examples: int = 256,
    memory_budget: int | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> TopKCache:
    """Run the teacher over the examples and keep, at every token, the top_k largest entries of log softmax(z / temperature).

    model: the teacher, a causal language model of transformers with all its weights here. It runs in evaluation mode, without
        gradients, on the device where its embeddings are, and is left as it was.
    examples: each {"input_ids": (L,) integers}, with "labels" (L,) where some do not count: a label is the token itself, or -100.
        Tokens at which an "attention_mask" (L,) is 0 are padding, and left out. Further columns that the teacher's forward takes go
        along as ``kdkernels.transformers.data.Collator`` batches them; what it does not take is refused, or, where it is a text or
        a number, named and left out. An example whose "position_ids" restart holds several documents, each of which becomes an
        example of the cache. Read twice, one at a time.
    folder: a new one, an empty one, or one of an earlier call. A call with the same arguments goes on where that one stopped; only
        whole shards of it are taken up. One call writes at a time.
    top_k: 1 to vocab_size. temperature: 1e-9 to 1e5. vocab_size: the softmax is over the first so many rows of the teacher's head
        (None: all), to leave out those that pad it. batch_size: examples in a forward, of similar lengths and padded on the right;
        it changes results by rounding only. shard_examples: examples in a file.
    memory_budget: bytes for the logits, which exist for so many tokens at a time as fit (None: as for the losses).
    about: names and digests that say what the cache was made from (JSON); an interrupted cache goes on only with the same.
    progress: called with the number of examples done and of all, at the start and after each forward.

    Log-probabilities are kept in float32, ids in int32: 8 bytes for each of top_k entries, and 4 for all others together, which the
    entries do not tell where the teacher is confident. float16 would save a quarter of that and put up to 0.4 % into a probability
    of e^-10.

    Raises ValueError or TypeError that names the argument, before any work; ValueError where a weight is NaN or infinite, as
    ``verify_lm_head`` does, and where the teacher's log-probabilities are NaN; CommandError where the folder holds other files,
    another cache (it says what differs), or a damaged file.
    """
    head = lm_head(model)
    _check(head, top_k=top_k, temperature=temperature, vocab_size=vocab_size, batch_size=batch_size, shard_examples=shard_examples)
    if memory_budget is not None:
        _count("memory_budget", memory_budget)
    check_weights(model, "teacher")
    embeddings: Any = unwrapped(model).get_input_embeddings()
    reader = _Reader(examples, Inputs.of({"teacher": model}))
    survey = _survey(reader)
    count = len(survey.lengths)
    identity: dict[str, Any] = {
        "version": VERSION,
        "top_k": top_k,
        "temperature": float(temperature),
        "vocab_size": head.weight.shape[0] if vocab_size is None else vocab_size,
        "shard_examples": shard_examples,
        "examples": count,
        "tokens": int(survey.lengths.sum()),
        "teacher_digest": _teacher_digest(model),
        "data_digest": survey.digest,
        "about": _plain(about),
    }
    if survey.columns:
        identity["columns"] = survey.columns
    folder = Path(folder)
    files.claim(folder, COMMAND, "folder")
    before = _read_manifest(folder) if (folder / MANIFEST).exists() else {}
    if before:
        _refuse_another(folder, before, identity)

    key = hashlib.blake2b(_json(identity).encode(), digest_size=16).hexdigest()
    shards = range(math.ceil(count / shard_examples))
    held = {shard: _read_shard(folder, shard, key) for shard in shards if (folder / shard_name(shard)).exists()}
    missing = [shard for shard in shards if shard not in held]
    done = sum(facts["examples"] for facts in held.values())

    def report(more: int) -> None:
        if progress is not None:
            progress(done + more, count)

    report(0)
    if missing:
        verify_lm_head(model, role="teacher")
        _write_manifest(folder, {**identity, "index": None, "shards": None})
        teacher = MostLikely(
            model,
            head,
            device=embeddings.weight.device,
            top_k=top_k,
            temperature=float(temperature),
            vocab=identity["vocab_size"],
            budget=default_budget(head.weight.device) if memory_budget is None else memory_budget,
        )
        with restored(model), evaluating(model):
            for shard in missing:
                numbers = range(count)[shard * shard_examples : (shard + 1) * shard_examples]
                tensors = _shard(teacher, reader, numbers, batch_size, report)
                facts = {"cache": key, "shard": shard, "examples": len(numbers), "tail_mass": _tail_mass(tensors["topk_rest"])}
                held[shard] = {**facts, "digest": files.save(folder / shard_name(shard), tensors, facts)}
                done += len(numbers)
    index = files.save(folder / INDEX, {"keys": survey.keys, "lengths": survey.lengths}, {"cache": key})
    listed = [{name: held[shard][name] for name in ("digest", "tail_mass")} for shard in shards]
    _write_manifest(folder, {**identity, "index": index, "shards": listed})
    return TopKCache(folder)


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
        manifest = _read_manifest(self.folder)
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
                raise _missing(self.folder / name)
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
        found = self._entries(_token_ids(ids, "ids"), {})
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
        key = _key(ids, further)
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
                raise _missing(path)
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


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def _shard(
    teacher: MostLikely, reader: _Reader, numbers: range, batch_size: int, progress: Callable[[int], None]
) -> dict[str, Tensor]:
    """The tensors of one shard: input_ids (tokens,) int32, counts (tokens,) uint8, lengths (examples,) int32, topk_ids and
    topk_logprobs (tokens, top_k) int32 and float32, topk_rest (tokens,) float32."""
    read = [reader.read(number) for number in numbers]
    sequences = [ids for ids, *_ in read]
    ends = torch.tensor([len(ids) for ids in sequences]).cumsum(0).tolist()
    topk_ids = torch.empty((ends[-1], teacher.top_k), dtype=torch.int32)
    logprobs = torch.empty((ends[-1], teacher.top_k), dtype=torch.float32)
    rest = torch.empty(ends[-1], dtype=torch.float32)
    # Alike lengths in a batch leave little to padding; the longest first shows at once whether memory suffices.
    order = sorted(range(len(sequences)), key=lambda each: -len(sequences[each]))
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        parts = teacher([sequences[each] for each in batch], [read[each].further for each in batch])
        made = [part.split([len(sequences[each]) for each in batch]) for part in parts]
        for each, ids, values, others in zip(batch, *made, strict=True):
            if values[:, 0].isnan().any():
                raise ValueError(
                    f"the teacher's log-probabilities of example {numbers[each]} are NaN: its logits hold NaN or +inf, as those "
                    "of a model do that overflows its dtype, or nothing but -inf"
                )
            rows = slice(ends[each] - len(ids), ends[each])
            topk_ids[rows], logprobs[rows], rest[rows] = ids, values, others
        progress(begin + len(batch))
    return {
        "input_ids": torch.cat(sequences).to(torch.int32),
        "counts": torch.cat([each.counts for each in read]),
        "lengths": torch.tensor([len(ids) for ids in sequences], dtype=torch.int32),
        "topk_ids": topk_ids,
        "topk_logprobs": logprobs,
        "topk_rest": rest,
    }


def _estimated_rest(logprobs: Tensor, vocab: int) -> Tensor:
    """The log-probability of all other tokens where it was not kept: logprobs (L, top_k) -> (L,). What the top_k leave of 1, but
    not less than float32 tells, nor more than tokens can have that are no likelier than the last of the top_k."""
    given = logprobs.double()
    left = log_of_rest(given, torch.full_like(given[:, 0], LEAST_REST))
    most = given[:, -1] + torch.tensor(vocab - logprobs.shape[1], dtype=torch.float64).log()
    return torch.minimum(left, most).float()


def _tail_mass(rest: Tensor) -> float:
    """Sum over the tokens of the probability that their entries leave to others."""
    return float(rest.double().exp().sum())


class _Document(NamedTuple):
    """ids: (L,) int64. counts: (L,) uint8, 1 where the token counts. further: columns that the teacher reads."""

    ids: Tensor
    counts: Tensor
    further: dict[str, Tensor]


class _Reader:
    """The examples, checked as they are read, and taken apart where they hold several documents."""

    def __init__(self, examples: Sequence[Mapping[str, Any]], inputs: Inputs) -> None:
        if len(examples) == 0:
            raise ValueError("examples is empty; accepted: at least one example")
        self.examples, self.inputs, self.collate = examples, inputs, Collator(None)
        self.places: list[tuple[int, int]] = []  # of each document: its example, and which one of that it is

    def survey(self) -> Iterator[_Document]:
        """All documents, in the order in which ``read`` then numbers them."""
        for example in range(len(self.examples)):
            found = self._documents(example)
            self.places += [(example, one) for one in range(len(found))]
            yield from found

    def read(self, document: int) -> _Document:
        example, one = self.places[document]
        return self._documents(example)[one]

    def _documents(self, place: int) -> list[_Document]:
        example, name = self.examples[place], f"examples[{place}]"
        if not isinstance(example, Mapping) or "input_ids" not in example:
            raise TypeError(f'{name} is {{"input_ids": ..., "labels": ...}}, got {type(example).__name__} without input_ids')
        ids = _token_ids(example["input_ids"], f"{name} input_ids")
        if len(ids) == 0:
            raise ValueError(f"{name} has no tokens; accepted: at least one")
        labels = ids if example.get("labels") is None else _token_ids(example["labels"], f"{name} labels")
        if labels.shape != ids.shape:
            raise ValueError(f"{name} has {len(ids)} tokens and {len(labels)} labels; accepted: as many")
        mask = torch.ones_like(ids)
        if example.get("attention_mask") is not None:
            mask = _token_ids(example["attention_mask"], f"{name} attention_mask")
            if mask.shape != ids.shape or not mask.any():
                held = f"{len(mask)} entries, {int(mask.count_nonzero())} of them not 0"
                raise ValueError(f"{name} attention_mask has {held}; accepted: {len(ids)}, at least one of them not 0")
        try:
            batch = self.inputs(
                self.collate([{**example, "input_ids": ids, "labels": labels, "attention_mask": mask}]), f"{name} holds"
            )
            found = documents(batch)
        except ValueError as error:
            raise ValueError(str(error) if name in str(error) else f"{name}: {error}") from error
        labels = batch["labels"][0]
        wrong = ((labels != IGNORED) & (labels != ids)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(f"{name} has the label {labels[at]} at token {ids[at]}; accepted: the token itself, or {IGNORED}")
        return [_Document(ids[places], (labels[places] != IGNORED).to(torch.uint8), further) for _, places, further in found]


class _Survey(NamedTuple):
    """What is known of the examples before the teacher runs. keys, lengths: (examples,) int64. digest: of all that is read.
    columns: names of further ones."""

    keys: Tensor
    lengths: Tensor
    digest: str
    columns: list[str]


def _survey(reader: _Reader) -> _Survey:
    everything = hashlib.blake2b(digest_size=16)
    keys, lengths, learned = [], [], False
    columns: set[str] = set()
    for ids, counts, further in reader.survey():
        keys.append(_key(ids, further))
        lengths.append(len(ids))
        columns.update(further)
        learned = learned or bool(counts[1:].any())
        everything.update(len(ids).to_bytes(8, "little") + _bytes(ids) + counts.numpy().tobytes() + _further_bytes(further))
    if not learned:
        logger.warning("No token of the examples counts: a student has nothing to learn from them unless it is given other labels.")
    return _Survey(torch.tensor(keys), torch.tensor(lengths), everything.hexdigest(), sorted(columns))


def _token_ids(value: Any, name: str) -> Tensor:
    """(L,) int64 on the CPU."""
    try:
        found = value.detach().cpu() if isinstance(value, Tensor) else torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is a sequence of integers, got {type(value).__name__}: {error}") from error
    integers = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if found.dim() != 1 or not (integers or len(found) == 0):
        raise TypeError(f"{name} is a sequence of integers, got shape {tuple(found.shape)}, {found.dtype}")
    return found.to(torch.int64)


def _bytes(ids: Tensor) -> bytes:
    return ids.numpy().astype("<i8").tobytes()


def _further_bytes(further: Mapping[str, Tensor]) -> bytes:
    """Of numbers as they are, whatever integers or floats they came as."""
    parts = []
    for name, value in sorted(further.items()):
        plain = value.to(torch.float64 if value.is_floating_point() else torch.int64).contiguous()
        parts.append(f"{name} {tuple(value.shape)}".encode() + plain.numpy().tobytes())
    return b"".join(parts)


def _key(ids: Tensor, further: Mapping[str, Tensor]) -> int:
    """A signed number of 64 bits. Two examples may share one: whoever looks one up compares the tokens."""
    digest = hashlib.blake2b(_bytes(ids) + _further_bytes(further), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _teacher_digest(model: nn.Module) -> str:
    """Of weights, configuration and adapters, whatever the model was called."""
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    for name, tensor in state.items():
        if tensor.device.type == "meta" or hasattr(tensor, "full_tensor"):
            raise ValueError(
                f"the teacher's {name} is not here (offloaded, sharded, or not loaded yet); accepted: a model in one piece"
            )
    config = unwrapped(model).config.to_dict()
    facts = {name: value for name, value in config.items() if name not in PROVENANCE}
    adapters = {name: adapter.to_dict() for name, adapter in getattr(model, "peft_config", {}).items()}
    return files.digest(state, json.dumps([facts, adapters], sort_keys=True, default=_ordered))


def _ordered(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _count(name: str, value: Any, most: int | None = None) -> None:
    accepted = "an integer of at least 1" if most is None else f"an integer from 1 to {most}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {accepted}, got {type(value).__name__}")
    if value < 1 or (most is not None and value > most):
        raise ValueError(f"{name} is {accepted}, got {value}")


def _check(head: LMHead, *, top_k: Any, temperature: Any, vocab_size: Any, batch_size: Any, shard_examples: Any) -> None:
    rows = head.weight.shape[0]
    if vocab_size is not None:
        _count("vocab_size", vocab_size, rows)
    _count("top_k", top_k, rows if vocab_size is None else vocab_size)
    temperature_of("temperature", temperature)
    _count("batch_size", batch_size)
    _count("shard_examples", shard_examples)


def _plain(about: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        made: dict[str, Any] = json.loads(json.dumps(dict(about or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"about is a mapping that can be written as JSON: {error}") from error
    return made


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True)


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(_json(content).encode(), digest_size=16).hexdigest()


def _write_manifest(folder: Path, content: dict[str, Any]) -> None:
    files.write(folder / MANIFEST, (_json({**content, "digest": _seal(content)}) + "\n").encode())


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        raise _missing(path)
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content.pop("digest") != _seal(content):
            raise ValueError("its digest does not match")
        if content["version"] not in READABLE:
            readable = " and ".join(map(str, READABLE))
            raise ValueError(f"it is of version {content['version']}, and this library reads versions {readable}")
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise files.damaged(path, str(error)) from error
    return content


def _read_shard(folder: Path, shard: int, key: str) -> dict[str, Any]:
    """What a whole shard says of itself, with its digest."""
    path = folder / shard_name(shard)
    _, facts = files.load(path)
    if facts.get("cache") != key or facts.get("shard") != shard:
        raise files.damaged(path, "it belongs to another cache, or to another place in this one")
    return {**facts, "digest": files.seal(path)}


def _missing(path: Path) -> CommandError:
    return CommandError(f"{path} is missing: make the cache with the same arguments again, which makes what is missing")


def _refuse_another(folder: Path, before: dict[str, Any], identity: dict[str, Any]) -> None:
    there, here = ({**side, **side["about"]} for side in (before, identity))
    names = [name for name in {**identity, **before["about"], **identity["about"]} if name != "about"]
    differing = [
        f"{name} is {there.get(name)} there and {here.get(name)} here" for name in names if there.get(name) != here.get(name)
    ]
    if differing:
        raise CommandError(f"{folder} holds another cache: {'; '.join(differing)}; accepted: the same, or another folder")
