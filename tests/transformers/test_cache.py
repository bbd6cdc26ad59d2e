"""Claims about a teacher's cached log-probabilities, held against the model's own logits in float64."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.cli import main
from kdkernels.console import files
from kdkernels.errors import CommandError, to_install
from tests.support.cases import InsideOperators

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from kdkernels.transformers import lm_head
from kdkernels.transformers.cache import TopKCache, documents, is_cache, read, write, write_cache
from kdkernels.transformers.cache.manifest import shard_name, write_manifest
from kdkernels.transformers.cache.most_likely import MostLikely
from tests.support import ROOT
from tests.support.tiny_models import VOCAB, build

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


@pytest.fixture(scope="module")
def llama() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def whole(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache made without an interruption."""
    folder = tmp_path_factory.mktemp("cache") / "whole"
    write_cache(llama, EXAMPLES, folder, **OPTIONS)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy, to do harm to."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


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


def as_version_1(folder: Path) -> None:
    """Make of a cache what an earlier release wrote: without the log-probability of the others."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for number, shard in enumerate(manifest["shards"]):
        tensors, facts = files.load(folder / shard_name(number))
        del tensors["topk_rest"]
        shard["digest"] = files.save(folder / shard_name(number), tensors, facts)
    del manifest["digest"]
    write_manifest(folder, {**manifest, "version": 1})


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


# --- whole files, and going on


def test_the_same_inputs_make_the_same_bytes(llama: Any, whole: Path, tmp_path: Path) -> None:
    write_cache(copy.deepcopy(llama), copy.deepcopy(EXAMPLES), tmp_path / "new", **OPTIONS)
    assert content(tmp_path / "new") == content(whole)
    names = {"kdkernels-cache.json", "manifest.json", "index.safetensors", *map(shard_name, range(SHARDS))}
    assert set(content(whole)) == names


class Killed(Exception):
    pass


def killed_at(call: int) -> Callable[[int, int], None]:
    """A progress callback that ends the run at its n-th call; the 0th is before any forward."""
    calls = iter(range(1000))

    def progress(done: int, total: int) -> None:
        if next(calls) == call:
            raise Killed

    return progress


@pytest.mark.parametrize("call", [0, 1, 2, 3, 5])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(llama: Any, whole: Path, tmp_path: Path, call: int) -> None:
    """Two forwards for each of two shards and one for the third; the call after a forward comes before its shard is written."""
    with pytest.raises(Killed):
        write_cache(llama, EXAMPLES, tmp_path, progress=killed_at(call), **OPTIONS)
    left = content(tmp_path)
    kept = max(0, call - 1) // 2
    assert sorted(name for name in left if name.startswith("shard")) == [shard_name(shard) for shard in range(kept)]
    assert all(left[name] == content(whole)[name] for name in left if name != "manifest.json")
    if call:
        with pytest.raises(
            CommandError, match=rf"is a cache that is not finished \({kept} of 3 shards\).*goes on where it stopped"
        ):
            TopKCache(tmp_path)
    seen: list[int] = []
    write_cache(llama, EXAMPLES, tmp_path, progress=lambda done, total: seen.append(done), **OPTIONS)
    assert seen[0] == 4 * kept, "whole shards are made again"
    assert seen[-1] == len(EXAMPLES)
    assert content(tmp_path) == content(whole)


KILLED = """
import os, signal, sys
import torch
from kdkernels.console import files
from kdkernels.transformers.cache import write_cache
from tests.transformers.test_cache import EXAMPLES, OPTIONS
from tests.support.tiny_models import build

torch.set_num_threads(1)
calls = iter(range(100))
sync = files.os.fsync

def killed(descriptor):  # the temporary file is written, and has not taken its name
    if next(calls) == 3:  # marker, manifest, first shard, second shard
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)

files.os.fsync = killed
write_cache(build("llama"), EXAMPLES, sys.argv[1], **OPTIONS)
"""


def test_a_kill_in_the_middle_of_a_write_leaves_whole_files_only(llama: Any, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    names = {path.name for path in folder.iterdir()}
    assert names == {"kdkernels-cache.json", "manifest.json", "shard-00000.safetensors", "shard-00001.safetensors.tmp"}
    write_cache(llama, EXAMPLES, folder, **OPTIONS)
    assert content(folder) == content(whole)


def test_a_finished_cache_is_not_made_again(llama: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(folder)
    monkeypatch.setattr(write, "MostLikely", None)
    write_cache(llama, EXAMPLES, folder, **OPTIONS)
    assert content(folder) == before


def flip(path: Path, place: float) -> None:
    harmed = bytearray(path.read_bytes())
    harmed[int(place * (len(harmed) - 1))] ^= 1
    path.write_bytes(harmed)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def look_everywhere(folder: Path) -> None:
    cache = TopKCache(folder)
    for example in EXAMPLES:
        cache.lookup(example["input_ids"])


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "index.safetensors", "manifest.json"])
@pytest.mark.parametrize(
    "harm", [lambda path: flip(path, 0.4), lambda path: flip(path, 0.99), cut], ids=["bit", "last bits", "cut"]
)
def test_a_damaged_file_is_named_and_made_anew_once_deleted(
    llama: Any, whole: Path, folder: Path, name: str, harm: Callable[[Path], None]
) -> None:
    harm(folder / name)
    with pytest.raises(CommandError) as caught:
        look_everywhere(folder)
    assert str(caught.value).startswith(f"{folder / name} is damaged (")
    if name != "index.safetensors":  # that is written anew in any case
        with pytest.raises(CommandError) as caught:
            write_cache(llama, EXAMPLES, folder, **OPTIONS)
        assert str(caught.value).startswith(f"{folder / name} is damaged (")
    (folder / name).unlink()
    write_cache(llama, EXAMPLES, folder, **OPTIONS)
    assert content(folder) == content(whole)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "shard-00002.safetensors", "index.safetensors", "manifest.json"])
def test_a_missing_file_is_named_and_made_anew(llama: Any, whole: Path, folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CommandError) as caught:
        TopKCache(folder)
    assert str(caught.value).startswith(f"{folder / name} is missing")
    write_cache(llama, EXAMPLES, folder, **OPTIONS)
    assert content(folder) == content(whole)


def test_a_shard_that_goes_missing_later_is_named(folder: Path) -> None:
    cache = TopKCache(folder)
    (folder / shard_name(2)).unlink()
    cache.lookup(EXAMPLES[0]["input_ids"])
    with pytest.raises(CommandError, match=r"shard-00002\.safetensors is missing"):
        cache.lookup(EXAMPLES[-1]["input_ids"])


def test_a_whole_file_of_another_cache_or_place_is_damage(llama: Any, folder: Path, tmp_path: Path) -> None:
    write_cache(llama, EXAMPLES, tmp_path / "other", **{**OPTIONS, "temperature": 2.0})
    second = folder / shard_name(1)
    for source in (tmp_path / "other" / second.name, folder / shard_name(0)):
        shutil.copyfile(source, second)
        with pytest.raises(CommandError, match=r"shard-00001\.safetensors is damaged \(it is another file"):
            look_everywhere(folder)
        with pytest.raises(CommandError, match=r"shard-00001\.safetensors is damaged \(it belongs to another cache"):
            write_cache(llama, EXAMPLES, folder, **OPTIONS)
    shutil.copyfile(tmp_path / "other" / "index.safetensors", folder / "index.safetensors")
    with pytest.raises(CommandError, match=r"index\.safetensors is damaged \(it is another file"):
        TopKCache(folder)


def test_a_changed_manifest_is_refused_whatever_was_changed(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest:
        (folder / "manifest.json").write_text(json.dumps({**manifest, name: 3}))
        with pytest.raises(CommandError, match=r"manifest\.json is damaged"):
            TopKCache(folder)
    for text in ("", "[]", "3", "{}", "\x00"):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(CommandError, match=r"manifest\.json is damaged"):
            TopKCache(folder)


def other_weight(model: Any) -> Any:
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    return model


def other_configuration(model: Any) -> Any:
    model.config.rms_norm_eps = 1e-3  # as a model of other code reads it; the weights are the same
    return model


def other_label(examples: Examples) -> Examples:
    counted = next(i for i, label in enumerate(examples[3]["labels"]) if label != -100)
    examples[3]["labels"][counted] = -100
    return examples


@pytest.mark.parametrize(
    ("options", "model", "examples", "parts"),
    [
        ({"top_k": 6}, None, None, ("top_k is 7 there and 6 here",)),
        ({"temperature": 2}, None, None, ("temperature is 1.0 there and 2.0 here",)),
        ({"vocab_size": 60}, None, None, ("vocab_size is 61 there and 60 here",)),
        ({"shard_examples": 5}, None, None, ("shard_examples is 4 there and 5 here",)),
        ({"about": {"tokenizer": "t2"}}, None, None, ("tokenizer is t1 there and t2 here", "max_length is 16 there and None here")),
        ({}, other_weight, None, ("teacher_digest is",)),
        ({}, other_configuration, None, ("teacher_digest is",)),
        ({}, None, other_label, ("data_digest is",)),
        ({}, None, lambda examples: examples[1:], ("examples is 11 there and 10 here", "data_digest is")),
        ({}, None, lambda examples: examples[::-1], ("data_digest is",)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_another_cache_in_the_folder_is_refused_with_what_differs(
    llama: Any, folder: Path, options: Any, model: Any, examples: Any, parts: tuple[str, ...]
) -> None:
    before = content(folder)
    teacher = model(copy.deepcopy(llama)) if model else llama
    data = examples(copy.deepcopy(EXAMPLES)) if examples else EXAMPLES
    with pytest.raises(CommandError) as caught:
        write_cache(teacher, data, folder, **{**OPTIONS, **options})
    message = str(caught.value)
    assert message.startswith(f"{folder} holds another cache: ")
    for part in parts:
        assert part in message
    assert message.count(" there and ") == len(parts) + ("tokens is" in message)
    assert message.endswith("accepted: the same, or another folder")
    assert content(folder) == before


def test_what_changes_no_result_is_no_other_cache(llama: Any, folder: Path) -> None:
    before = content(folder)
    twin = copy.deepcopy(llama).train()
    twin.config._name_or_path = twin.config.transformers_version = "elsewhere"
    tensors = [{name: torch.tensor(values) for name, values in example.items()} for example in EXAMPLES]
    write_cache(twin, tensors, folder, **{**OPTIONS, "batch_size": 1, "memory_budget": 1})
    assert content(folder) == before


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # peft 0.21 with transformers 5.23
def test_a_teacher_with_another_adapter_is_another_teacher(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted(alpha: int) -> Any:
        settings = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return peft.get_peft_model(build("llama"), settings).eval()

    cache = write_cache(adapted(2), EXAMPLES, tmp_path, **OPTIONS)
    assert_right(cache, adapted(2), EXAMPLES)
    before = content(tmp_path)
    write_cache(adapted(2), EXAMPLES, tmp_path, **OPTIONS)
    assert content(tmp_path) == before
    with pytest.raises(CommandError, match="teacher_digest is"):
        write_cache(adapted(4), EXAMPLES, tmp_path, **OPTIONS)


def test_a_folder_of_other_files_is_left_alone(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CommandError, match=r"^folder .* holds other files"):
        write_cache(llama, EXAMPLES, tmp_path, **OPTIONS)
    assert content(tmp_path) == {"thesis.txt": b"mine"}


# --- reading


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


@pytest.mark.parametrize(
    ("error", "given", "message"),
    [
        (ValueError, {"top_k": 0}, "top_k is an integer from 1 to 61, got 0"),
        (ValueError, {"top_k": 62}, "top_k is an integer from 1 to 61, got 62"),
        (ValueError, {"top_k": 51, "vocab_size": 50}, "top_k is an integer from 1 to 50, got 51"),
        (TypeError, {"top_k": 2.0}, "top_k is an integer from 1 to 61, got float"),
        (ValueError, {"vocab_size": 62}, "vocab_size is an integer from 1 to 61, got 62"),
        (ValueError, {"temperature": 0.0}, "temperature is a positive number from 1e-9 to 1e5, got 0.0"),
        (ValueError, {"temperature": math.nan}, "temperature is a positive number from 1e-9 to 1e5, got nan"),
        (ValueError, {"batch_size": 0}, "batch_size is an integer of at least 1, got 0"),
        (TypeError, {"shard_examples": True}, "shard_examples is an integer of at least 1, got bool"),
        (ValueError, {"memory_budget": 0}, "memory_budget is an integer of at least 1, got 0"),
        (TypeError, {"about": {"model": object()}}, "about is a mapping that can be written as JSON"),
        (TypeError, {"about": {"loss": math.nan}}, "about is a mapping that can be written as JSON"),
        (ValueError, {"examples": []}, "examples is empty"),
        (TypeError, {"examples": [[1, 2]]}, r"examples\[0\] is .* got list"),
        (TypeError, {"examples": [EXAMPLES[0], {"ids": [1]}]}, r"examples\[1\] is .* got dict without input_ids"),
        (ValueError, {"examples": [{"input_ids": []}]}, r"examples\[0\] has no tokens"),
        (ValueError, {"examples": [{"input_ids": [3, VOCAB]}]}, r"examples\[0\] holds the token 61; accepted: 0 to 60"),
        (ValueError, {"examples": [{"input_ids": [3, -1]}]}, r"examples\[0\] holds the token -1; accepted: 0 to 60"),
        (TypeError, {"examples": [{"input_ids": [3.0]}]}, r"examples\[0\] input_ids is a sequence of integers, got shape"),
        (TypeError, {"examples": [{"input_ids": ["a"]}]}, r"examples\[0\] input_ids is a sequence of integers, got list"),
        (TypeError, {"examples": [{"input_ids": [[3]]}]}, r"examples\[0\] input_ids is a sequence of integers, got shape \(1, 1\)"),
        (ValueError, {"examples": [{"input_ids": [3, 4], "labels": [3]}]}, r"examples\[0\] has 2 tokens and 1 labels"),
        (ValueError, {"examples": [{"input_ids": [3, 4], "labels": [4, -100]}]}, r"the label 4 at token 3; accepted: the token"),
        (
            ValueError,
            {"examples": [{"input_ids": [3, 4], "attention_mask": [0, 0]}]},
            r"attention_mask has 2 entries, 0 of them not 0",
        ),
        (TypeError, {"model": 3}, "model is a causal language model"),
    ],
)
def test_bad_input_is_named_before_any_work(
    llama: Any, tmp_path: Path, error: type[Exception], given: dict[str, Any], message: str
) -> None:
    arguments = {"model": llama, "examples": EXAMPLES, **OPTIONS, **given}
    with pytest.raises(error, match=message):
        write_cache(folder=tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_a_teacher_that_is_not_here_is_refused(llama: Any, tmp_path: Path) -> None:
    twin = copy.deepcopy(llama)
    twin.model.layers[1].to("meta")
    with pytest.raises(ValueError, match=r"the teacher's model\.layers\.1\..* is not here"):
        write_cache(twin, EXAMPLES, tmp_path / "new", **OPTIONS)


# --- the command


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "slept"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and its tokenizer ("teacher") and data for it ("data.jsonl")."""
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("saved")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["<unk>", "<eos>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder / "teacher")
    build("llama", max_position_embeddings=32).save_pretrained(folder / "teacher")
    texts = [" ".join(WORDS[(start + step) % 8] for step in range(start + 2)) for start in range(10)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def command(saved: Path, out: Path, **options: Any) -> list[str]:
    given = {"teacher": saved / "teacher", "data": saved / "data.jsonl", "out": out, "top-k": 5, "max-length": 32, **options}
    return ["cache", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]


def last_error(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str]:
    try:
        status = main(arguments)
    except SystemExit as stop:  # argparse's own way out
        status = int(stop.code or 0)
    lines = capsys.readouterr().err.strip().splitlines()
    return status, lines[-1] if lines else ""


def test_the_command_makes_a_cache_and_says_what_is_in_it(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(command(saved, out, temperature=2, vocab_size=10)) == 0
    shown = capsys.readouterr().out.splitlines()
    cache = TopKCache(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    tail = f"of the probability, {cache.tail_mass:.4f} is outside the top 5 on average"
    assert shown == [f"10 examples, 75 tokens, {size:,} bytes in {out}/; {tail}"]
    assert (len(cache), cache.tokens, cache.temperature, cache.vocab_size) == (10, 75, 2.0, 10)
    assert_right(cache, build("llama", max_position_embeddings=32), list(cache.examples()), 10, 2.0)
    assert not any(str(part) in (out / "manifest.json").read_text() for part in (saved, tmp_path)), "a path of this machine"

    before = content(out)
    monkeypatch.chdir(saved)
    given = {"teacher": "./teacher", "data": "data.jsonl", "temperature": 2, "vocab_size": 10}
    assert main(command(saved, out, **given)) == 0, "the same by another path"
    assert capsys.readouterr().out.splitlines() == ["10 of 10 examples were there from an earlier run", *shown]
    assert content(out) == before


def test_the_command_goes_on_after_an_interrupt(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = MostLikely.__call__, iter(range(100))

    def interrupted(self: MostLikely, *arguments: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(MostLikely, "__call__", interrupted)
    monkeypatch.setattr(write_cache, "__kwdefaults__", {**write_cache.__kwdefaults__, "shard_examples": 4})
    out, whole = tmp_path / "out", tmp_path / "whole"
    status, line = last_error(capsys, command(saved, out, batch_size=4))
    assert (status, line) == (130, "interrupted; the same command again goes on after the last whole shard")
    assert main(command(saved, out, batch_size=4)) == 0
    assert "8 of 10 examples were there" in capsys.readouterr().out
    assert main(command(saved, whole, batch_size=4)) == 0
    assert content(out) == content(whole)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"top-k": 0}, ("--top-k", "'0'", "at least 1")),
        ({"temperature": "-1"}, ("--temperature", "'-1'", "a positive number")),
        ({"max-length": 1}, ("--max-length", "'1'", "at least 2")),
        ({"limit": "few"}, ("--limit", "'few'", "an integer")),
        ({"batch-size": 1.5}, ("--batch-size", "'1.5'", "an integer")),
        ({"dtype": "int8"}, ("--dtype", "'int8'", "bfloat16")),
        ({"teacher": "./nothing"}, ("error: './nothing' cannot be loaded", "no such folder")),
        ({"data": "./nothing.jsonl"}, ("error: './nothing.jsonl'", "no such file")),
        ({"split": "test"}, ("error: ", "no split 'test'")),
        ({"vocab-size": 62}, ("error: vocab_size", "from 1 to 61", "62")),
        ({"top-k": 62}, ("error: top_k", "from 1 to 61", "62")),
    ],
)
def test_a_bad_argument_is_one_line(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path, options: dict[str, Any], parts: tuple[str, ...]
) -> None:
    status, line = last_error(capsys, command(saved, tmp_path / "out", **options))
    assert status == 2
    for part in parts:
        assert part in line
    assert not list((tmp_path / "out").glob("shard*"))


def test_a_window_longer_than_the_teacher_takes_is_one_line(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text(" ".join(WORDS * 9))
    status, line = last_error(capsys, command(saved, tmp_path / "out", data=tmp_path / "long.txt", **{"max-length": 40}))
    assert status == 2
    assert line == "error: the longest example has 40 tokens, and the teacher takes 32; accepted: --max-length up to 32"
    assert main(command(saved, tmp_path / "out", data=tmp_path / "long.txt")) == 0


def test_other_settings_in_the_folder_are_one_line(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    assert main(command(saved, tmp_path / "out")) == 0
    status, line = last_error(capsys, command(saved, tmp_path / "out", **{"top-k": 6, "limit": 9}))
    assert status == 2
    assert line.startswith(f"error: {tmp_path / 'out'} holds another cache: top_k is 5 there and 6 here")
    assert "limit is None there and 9 here" in line
    status, line = last_error(capsys, command(saved, saved))
    assert status == 2
    assert line.startswith(f"error: --out {saved} holds other files")


@pytest.mark.parametrize("what", ["a shard", "the tokenizer"])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """tokenizers raises no OSError, but a class of its own with the system's words."""
    from transformers import PreTrainedTokenizerFast

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_space_in_rust(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        if what == "a shard":
            patched.setattr(files, "save", no_space)
        else:
            patched.setattr(PreTrainedTokenizerFast, "save_pretrained", no_space_in_rust)
        status, line = last_error(capsys, command(saved, out))
    assert (status, line) == (
        2,
        f"error: --out {out} cannot be written: No space left on device; with room the same command again goes on after the last "
        "whole shard",
    )
    assert main(command(saved, out)) == 0
    assert (out / "tokenizer" / "tokenizer.json").exists()


def test_a_missing_library_is_one_line(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    status, line = last_error(capsys, command(saved, tmp_path / "out"))
    assert (status, line) == (2, f"error: the cache needs rich, not installed here: {to_install('transformers')}")
