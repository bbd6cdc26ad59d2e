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
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.console import files
from kdkernels.errors import CommandError
from kdkernels.planning.plan import default_budget
from kdkernels.scalars import count, temperature_of
from kdkernels.transformers.batches.inputs import Inputs
from kdkernels.transformers.cache.documents import Reader, Survey, survey_of
from kdkernels.transformers.cache.manifest import (
    COMMAND,
    INDEX,
    MANIFEST,
    VERSION,
    as_json,
    read_manifest,
    shard_name,
    write_manifest,
)
from kdkernels.transformers.cache.most_likely import MostLikely
from kdkernels.transformers.cache.read import TopKCache
from kdkernels.transformers.finite import check_weights
from kdkernels.transformers.heads import lm_head, unwrapped
from kdkernels.transformers.modes import evaluating, restored
from kdkernels.transformers.verify import verify_lm_head

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
    rows = head.weight.shape[0]
    vocab = rows if vocab_size is None else _count("vocab_size", vocab_size, rows)
    top_k, temperature = _count("top_k", top_k, vocab), temperature_of("temperature", temperature)
    batch_size, shard_examples = _count("batch_size", batch_size), _count("shard_examples", shard_examples)
    budget = default_budget(head.weight.device) if memory_budget is None else _count("memory_budget", memory_budget)
    settings = {"top_k": top_k, "temperature": temperature, "vocab_size": vocab, "shard_examples": shard_examples}
    check_weights(model, "teacher")
    reader = Reader(examples, Inputs.of({"teacher": model}))
    survey = survey_of(reader)
    identity = _identity(model, survey, settings, about)
    folder = Path(folder)
    _claim(folder, identity)

    key = hashlib.blake2b(as_json(identity).encode(), digest_size=16).hexdigest()
    shards = range(math.ceil(len(survey.lengths) / shard_examples))
    held = {shard: _read_shard(folder, shard, key) for shard in shards if (folder / shard_name(shard)).exists()}
    missing = [shard for shard in shards if shard not in held]
    done = sum(facts["examples"] for facts in held.values())

    def report(more: int) -> None:
        if progress is not None:
            progress(done + more, len(survey.lengths))

    report(0)
    if missing:
        verify_lm_head(model, role="teacher")
        write_manifest(folder, {**identity, "index": None, "shards": None})
        teacher = MostLikely(model, head, top_k=top_k, temperature=temperature, vocab=vocab, budget=budget)
        with restored(model), evaluating(model):
            for shard in missing:
                numbers = range(len(survey.lengths))[shard * shard_examples : (shard + 1) * shard_examples]
                tensors = _shard(teacher, reader, numbers, batch_size, report)
                facts = {"cache": key, "shard": shard, "examples": len(numbers), "tail_mass": _tail_mass(tensors["topk_rest"])}
                held[shard] = {**facts, "digest": files.save(folder / shard_name(shard), tensors, facts)}
                done += len(numbers)
    index = files.save(folder / INDEX, {"keys": survey.keys, "lengths": survey.lengths}, {"cache": key})
    listed = [{name: held[shard][name] for name in ("digest", "tail_mass")} for shard in shards]
    write_manifest(folder, {**identity, "index": index, "shards": listed})
    return TopKCache(folder)


def _shard(
    teacher: MostLikely, reader: Reader, numbers: range, batch_size: int, progress: Callable[[int], None]
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


def _tail_mass(rest: Tensor) -> float:
    """Sum over the tokens of the probability that their entries leave to others."""
    return float(rest.double().exp().sum())


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


def _count(name: str, value: Any, most: int | None = None) -> int:
    return count(name, value, high=most, kind="an integer")


def _plain(about: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        made: dict[str, Any] = json.loads(json.dumps(dict(about or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"about is a mapping that can be written as JSON: {error}") from error
    return made


def _read_shard(folder: Path, shard: int, key: str) -> dict[str, Any]:
    """What a whole shard says of itself, with its digest."""
    path = folder / shard_name(shard)
    _, facts = files.load(path)
    if facts.get("cache") != key or facts.get("shard") != shard:
        raise files.damaged(path, "it belongs to another cache, or to another place in this one")
    return {**facts, "digest": files.seal(path)}


def _identity(model: nn.Module, survey: Survey, settings: Mapping[str, Any], about: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the manifest says of a cache; two of the same are one cache."""
    return {
        "version": VERSION,
        **settings,
        "examples": len(survey.lengths),
        "tokens": int(survey.lengths.sum()),
        "teacher_digest": _teacher_digest(model),
        "data_digest": survey.digest,
        "about": _plain(about),
        **({"columns": survey.columns} if survey.columns else {}),
    }


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Take the folder for this cache; CommandError where it holds another one, or something else."""
    files.claim(folder, COMMAND, "folder")
    if not (folder / MANIFEST).exists():
        return
    before = read_manifest(folder)
    there, here = ({**side, **side["about"]} for side in (before, identity))
    names = [name for name in {**identity, **before["about"], **identity["about"]} if name != "about"]
    differing = [
        f"{name} is {there.get(name)} there and {here.get(name)} here" for name in names if there.get(name) != here.get(name)
    ]
    if differing:
        raise CommandError(f"{folder} holds another cache: {'; '.join(differing)}; accepted: the same, or another folder")
